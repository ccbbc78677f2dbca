"""Liveness, readiness, of all models and of each, and metrics: answered from the first moment on, while models are still being loaded."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service import metrics
from service.api import catalogue
from service.api.state import State, state
from service.errors import NotAlive, NotReady


async def livez(request: Request) -> Response:
    """200 as long as the process answers and its batcher's heart beats; else 503, and only a restart helps."""
    app = state(request)
    if app.batcher.is_dead and not app.is_draining:
        raise NotAlive(reason="The queue is not being worked off. Restart the server.")
    if (seconds := app.batcher.running_seconds) > app.stall_seconds:
        raise NotAlive(
            reason=f"A chunk has been running for {seconds:.0f} s, more than the {app.stall_seconds:g} s of CELLSERVE_STALL_SECONDS. "
            "Restart the server."
        )
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """200 when the default version of every model answers; else 503 with the reason. Both list every version and its state."""
    app = state(request)
    if (reason := why_not_ready(app)) is not None:
        raise NotReady(reason=reason, models=app.models.states())
    return JSONResponse({"status": "ready", "models": app.models.states()})


async def model_ready(request: Request) -> Response:
    """200 when this model or version answers; else 503 with the reason."""
    app, path = state(request), request.path_params
    model_id = app.models.choose(catalogue.named(request))
    reason = _problem(app) or app.models.problem_of(str(model_id) if "version" in path else model_id.name)
    states = app.models.states()
    if reason is not None:
        raise NotReady(reason=reason, models={str(model_id): states[str(model_id)]})
    return JSONResponse({"status": "ready", "models": {str(model_id): states[str(model_id)]}})


def why_not_ready(app: State) -> str | None:
    """Why requests should go elsewhere, or None."""
    return _problem(app) or app.models.problem()


def _problem(app: State) -> str | None:
    """Why no model at all can answer."""
    if app.is_draining:
        return "This server is shutting down."
    if not app.batcher.is_running:
        return "The queue is not being worked off. Restart the server."
    return None


async def scrape(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
    """All metrics in Prometheus' text format."""
    return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)


async def request_progress(request: Request) -> Response:
    """How far a long request is. Ids that no request can have are as unknown as those that none has."""
    return JSONResponse(state(request).progress.of(request.path_params["request_id"]))
