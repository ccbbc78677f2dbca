"""The request id: the client's own where it is usable, else a new one. On every answer and every log line."""

import re
import secrets
from contextvars import ContextVar

from starlette.types import Scope

HEADER_NAME = b"x-request-id"
SCOPE_KEY = "cellserve.request_id"
current: ContextVar[str | None] = ContextVar("cellserve_request_id", default=None)
# What may stand in a log line and a header as it is; anything else is replaced, not escaped.
_USABLE = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


def of(scope: Scope) -> str:
    """The id of a request."""
    sent = next((value for name, value in scope["headers"] if name == HEADER_NAME), b"")
    return sent.decode() if _USABLE.fullmatch(sent) else secrets.token_hex(16)
