"""One metric and one log line per request, labelled by route template and never by path."""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics

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
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def route(path: str, endpoint: Endpoint, method: str) -> Route:
    """A route of one method, in whose path `:path` marks a parameter that may hold slashes."""
    return Route(path, Labelled(endpoint, path.replace(":path}", "}")), methods=[method])


class Access:
    """Middleware that measures requests from first byte to last."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = time.perf_counter()
        status = 0  # stays so where the client left before there was one
        sending = 0.0
        has_left = True

        async def watched_send(message: Message) -> None:
            nonlocal status, sending, has_left
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                has_left = False
            waits = time.perf_counter()
            await send(message)
            sending += time.perf_counter() - waits

        with metrics.REQUESTS_IN_FLIGHT.track_inprogress():
            try:
                await self._app(scope, receive, watched_send)
            except Exception:
                has_left = False  # it is the answer that broke off
                raise
            finally:
                if has_left:
                    metrics.CANCELLED.inc()
                seconds = time.perf_counter() - started
                template = scope.get(TEMPLATE, UNMATCHED)
                method = scope["method"] if scope["method"] in METHODS else "other"
                metrics.series(metrics.REQUESTS, template, method, str(status)).inc()
                metrics.series(metrics.REQUEST_SECONDS, template).observe(seconds)
                metrics.series(metrics.SEND_SECONDS, template).observe(sending)
                if template not in QUIET:
                    logger.info(
                        "request",
                        extra={"route": template, "method": method, "status": status, "seconds": round(seconds, 6)},
                    )
