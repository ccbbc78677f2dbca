"""One metric and one log line per request, labelled by route template and never by path."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from service import metrics
from service.api.request import ApiRequest

logger = logging.getLogger("cellserve.access")
UNMATCHED = "unmatched"
TEMPLATE = "cellserve.route"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUIET = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Labelled:
    """An endpoint as an application, which tells the middleware its template; Starlette would wrap it twice more, for errors."""

    endpoint: Endpoint
    template: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        scope[TEMPLATE] = self.template
        response = await self.endpoint(ApiRequest(scope, receive, send))
        await response(scope, receive, send)


def route(path: str, endpoint: Endpoint, method: str) -> Route:
    """A route of one method, in whose path `:path` marks a parameter that may hold slashes."""
    return Route(path, Labelled(endpoint, path.replace(":path}", "}")), methods=[method])


def note(scope: Scope, status: int, seconds: float, sending_seconds: float) -> None:
    """Count a request that is over, and log it.

    Args:
        scope: of the request.
        status: of its answer; 0 where its client left before there was one.
        seconds: from its first byte to the last of its answer.
        sending_seconds: of those, what handing the answer to the server took, which waits for a client that reads slowly.
    """
    template = scope.get(TEMPLATE, UNMATCHED)
    method = scope["method"] if scope["method"] in METHODS else "other"
    metrics.series(metrics.REQUESTS, template, method, str(status)).inc()
    metrics.series(metrics.REQUEST_SECONDS, template).observe(seconds)
    metrics.series(metrics.SEND_SECONDS, template).observe(sending_seconds)
    if template not in QUIET:
        logger.info(
            "request", extra={"route": template, "method": method, "status": status, "seconds": round(seconds, 6)}
        )
