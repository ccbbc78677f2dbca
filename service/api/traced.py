"""A span per request, from its first byte to the last of its answer; its trace id on the answer and on every log line."""

from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing
from service.api import request_id
from service.api.access import METHODS, QUIET, TEMPLATE, UNMATCHED

if TYPE_CHECKING:
    from service.trace_export import Traces

HEADER = "traceresponse"


class Traced:
    """Middleware that sets `tracing.current` for requests that are sampled. Probes and scrapes are not traced."""

    def __init__(self, app: ASGIApp, traces: "Traces") -> None:
        self._app, self._traces = app, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["path"] in QUIET:
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        # Never the path or the query: they may hold names of genes.
        trace = self._traces.begin(method, scope["headers"], {"http.request.method": method})
        token = tracing.current.set(trace)  # also None: the context may still be that of an earlier request
        try:
            await (
                self._app(scope, receive, send) if trace is None else self._record(trace, method, scope, receive, send)
            )
        finally:
            tracing.current.reset(token)

    async def _record(self, trace: tracing.RequestTrace, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0
        failure: str | None = "client_disconnect"

        async def watched_send(message: Message) -> None:
            nonlocal status, failure
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = trace.header
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                failure = None

        try:
            await self._app(scope, receive, watched_send)
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            template = scope.get(TEMPLATE, UNMATCHED)
            trace.span.update_name(f"{name} {template}")
            attributes: dict[str, str | int] = {
                "http.route": template,
                "cellserve.request_id": scope.get(request_id.SCOPE_KEY, ""),
            }
            if status:
                attributes["http.response.status_code"] = status
            if trace.problem is not None:
                attributes["cellserve.problem"] = trace.problem
            # A client's own mistake (4xx) is no failure of the server's span.
            trace.end(attributes, failure or (trace.problem if status >= 500 else None))
