"""Liveness, readiness and metrics: answered from the first moment on, while models are still being loaded."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service import metrics
from service.api.state import State, state
from service.errors import NotReady


async def livez(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
    """200 as long as the process answers."""
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """200 when the default version of every model answers; else 503 with the reason. Both list every version and its state."""
    app = state(request)
    if (reason := why_not_ready(app)) is not None:
        raise NotReady(reason=reason, models=app.models.states())
    return JSONResponse({"status": "ready", "models": app.models.states()})


def why_not_ready(app: State) -> str | None:
    """Why requests should go elsewhere, or None."""
    if app.is_draining:
        return "This server is shutting down."
    if not app.batcher.is_running:
        return "The queue is not being worked off. Restart the server."
    return app.models.problem()


async def scrape(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
    """All metrics in Prometheus' text format."""
    return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)
