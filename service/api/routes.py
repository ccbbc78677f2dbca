"""The HTTP application: one route per task, the catalogue, health, metrics and the OpenAPI document."""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from service import metrics
from service.api import catalogue, explanations, genes_check, health, oip, oip_infer, openapi, problems, whole_query
from service.api.access import route
from service.api.front import Front
from service.api.state import State
from service.api.tasks import endpoint
from service.api.traced import Traced
from service.inference import TASKS
from service.inference.questions import QUESTIONS


class Api(Starlette):
    """Starlette without its own two middlewares for errors: Front answers all of them, and each request would pay for both."""

    def build_middleware_stack(self) -> ASGIApp:
        """The router inside the middlewares that were given, the first outermost."""
        app: ASGIApp = self.router
        for middleware, args, kwargs in reversed(self.user_middleware):
            app = middleware(app, *args, **kwargs)
        return app


def build_api(state: State) -> Starlette:
    """The application over its parts."""
    metrics.initialise(tuple(TASKS), problems.CODES)
    routes = [
        *(route(f"/v1/{task.name}", endpoint(task), "POST") for task in TASKS.values()),
        *(route(f"/v1/{one.name}", whole_query.endpoint(one), "POST") for one in QUESTIONS.values()),
        route("/v1/genes/check", genes_check.check, "POST"),
        route("/v1/models", catalogue.list_models, "GET"),
        route("/v1/models/{name}", catalogue.show_model, "GET"),
        route("/v1/models/{name}/card", catalogue.show_card, "GET"),
        route("/v1/models/{name}/genes", catalogue.show_genes, "GET"),
        route("/v1/models/{name}/reference", catalogue.show_reference, "GET"),
        route("/v1/models/{name}/versions/{version}", catalogue.show_model, "GET"),
        route("/v1/models/{name}/versions/{version}/card", catalogue.show_card, "GET"),
        route("/v1/models/{name}/versions/{version}/genes", catalogue.show_genes, "GET"),
        route("/v1/models/{name}/versions/{version}/reference", catalogue.show_reference, "GET"),
        *explanation_routes(),
        *oip_routes(),
        route("/v1/models/{name}/ready", health.model_ready, "GET"),
        route("/v1/models/{name}/versions/{version}/ready", health.model_ready, "GET"),
        route("/v1/requests/{request_id:path}", health.request_progress, "GET"),
        route("/v1/admin/reload", catalogue.reload, "POST"),
        route("/livez", health.livez, "GET"),
        route("/readyz", health.readyz, "GET"),
        route("/metrics", health.scrape, "GET"),
        route("/docs.json", _docs, "GET"),
    ]
    traced = [Middleware(Traced, traces=state.traces)] if state.traces is not None else []
    # Outside, so that every line that Front logs carries the trace id.
    app = Api(routes=routes, middleware=[*traced, Middleware(Front, state=state)])
    app.router.redirect_slashes = False
    app.state.cellserve = state
    return app


def explanation_routes() -> list[Route]:
    """What the units and labels of a model are made of."""
    models = ("/v1/models/{name}", "/v1/models/{name}/versions/{version}")
    paths = {
        "/units": explanations.list_units,
        "/units/{unit}": explanations.show_unit,
        "/labels": explanations.list_labels,
        # A label may hold a slash.
        "/labels/{level}/{label:path}": explanations.show_label,
    }
    return [route(model + path, endpoint, "GET") for model in models for path, endpoint in paths.items()]


def oip_routes() -> list[Route]:
    """The paths of the Open Inference Protocol v2."""
    models = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
    of_models = {"": oip.model_metadata, "/ready": oip.model_ready, "/config": oip.config, "/stats": oip.statistics}
    return [
        route("/v2", oip.server_metadata, "GET"),
        route("/v2/health/live", oip.live, "GET"),
        route("/v2/health/ready", oip.ready, "GET"),
        route("/v2/models/stats", oip.all_statistics, "GET"),
        *(route(model + path, endpoint, "GET") for model in models for path, endpoint in of_models.items()),
        *(route(f"{model}/infer", oip_infer.infer, "POST") for model in models),
        route("/v2/repository/index", oip.index, "POST"),
    ]


async def _docs(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
    return JSONResponse(openapi.document())
