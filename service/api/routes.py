"""The HTTP application: one route per task, the catalogue, health, metrics and the OpenAPI document."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service import metrics
from service.api import catalogue, health, openapi, problems
from service.api.access import Access, route
from service.api.drain import Draining
from service.api.request_id import RequestId
from service.api.state import State
from service.api.tasks import endpoint
from service.errors import CellserveError
from service.inference import TASKS


def build_api(state: State) -> Starlette:
    """The application over its parts."""
    metrics.initialise(tuple(TASKS), problems.CODES)
    routes = [
        *(route(f"/v1/{task.name}", endpoint(task), "POST") for task in TASKS.values()),
        route("/v1/models", catalogue.list_models, "GET"),
        route("/v1/models/{name}", catalogue.show_model, "GET"),
        route("/v1/models/{name}/genes", catalogue.show_genes, "GET"),
        route("/v1/models/{name}/versions/{version}", catalogue.show_model, "GET"),
        route("/v1/models/{name}/versions/{version}/genes", catalogue.show_genes, "GET"),
        route("/v1/models/{name}/ready", health.model_ready, "GET"),
        route("/v1/models/{name}/versions/{version}/ready", health.model_ready, "GET"),
        route("/v1/admin/reload", catalogue.reload, "POST"),
        route("/livez", health.livez, "GET"),
        route("/readyz", health.readyz, "GET"),
        route("/metrics", health.scrape, "GET"),
        route("/docs.json", _docs, "GET"),
    ]
    app = Starlette(
        routes=routes,
        # The id first, so that every line and problem below carries it; problems innermost, so that their status is measured.
        middleware=[
            Middleware(RequestId),
            Middleware(Draining, state=state),
            Middleware(Access),
            Middleware(problems.Problems),
        ],
        exception_handlers={HTTPException: problems.from_starlette, CellserveError: problems.from_starlette},
    )
    app.router.redirect_slashes = False
    app.state.cellserve = state
    return app


async def _docs(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
    return JSONResponse(openapi.document())
