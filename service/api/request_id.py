"""The request id: the client's own where it is usable, else a new one. On every answer and every log line."""

import re
import secrets
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-ID"
current: ContextVar[str | None] = ContextVar("cellserve_request_id", default=None)
# What may stand in a log line and a header as it is; anything else is replaced, not escaped.
_USABLE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestId:
    """Middleware that sets `current` for the request and X-Request-ID on its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        sent = Headers(scope=scope).get(HEADER, "")
        request_id = sent if _USABLE.fullmatch(sent) else secrets.token_hex(16)
        token = current.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            current.reset(token)
