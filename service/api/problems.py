"""From an error to a status and a problem document (RFC 9457). The only file with status codes of errors."""

import logging
from collections.abc import Callable
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from service import errors, metrics, tracing
from service.api import request_id

logger = logging.getLogger("cellserve.api")
MEDIA_TYPE = "application/problem+json"

STATUS: dict[type[errors.CellserveError], int] = {
    errors.MalformedBody: 400,
    errors.EmptyBody: 400,
    errors.InvalidOption: 400,
    errors.NotAuthorised: 401,
    errors.RouteNotFound: 404,
    errors.ModelNotFound: 404,
    errors.TaskNotOffered: 404,
    errors.RequestNotFound: 404,
    errors.NoReference: 404,
    errors.ImpactNotOffered: 404,
    errors.UnitNotFound: 404,
    errors.LabelNotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.NotAcceptable: 406,
    errors.BodyTimeout: 408,
    errors.FileReaderEnded: 400,
    errors.BodyTooLarge: 413,
    errors.FileTooLarge: 413,
    errors.FileNeedsTooMuch: 413,
    errors.TooManyCells: 413,
    errors.UnsupportedMediaType: 415,
    errors.InvalidCells: 422,
    errors.NoCells: 422,
    errors.FileRefused: 422,
    errors.NoRawCounts: 422,
    errors.TooFewGenes: 422,
    errors.SpeciesMismatch: 422,
    errors.NotRawCounts: 422,
    errors.QueueFull: 429,
    errors.DeadlineTooShort: 429,
    errors.TooManyBytes: 429,
    errors.ClientBudgetSpent: 429,
    errors.CellserveError: 500,
    errors.AnswerNotWritten: 500,
    errors.InvalidArtifact: 500,
    errors.VersionExists: 500,
    errors.ProviderUnavailable: 500,
    errors.GoldenMismatch: 500,
    errors.UnstableBits: 500,
    errors.ModelNotReady: 503,
    errors.NotReady: 503,
    errors.NotAlive: 503,
    errors.ShuttingDown: 503,
    errors.RequestTimeout: 504,
    errors.DeadlinePassed: 504,
    errors.NoDiskSpace: 507,
}
PROTOCOL_PATH = "/v2"
"""Below it the Open Inference Protocol is spoken, which has a form of its own for errors."""

PROTOCOL_STATUS = {406: 400, 422: 400}
"""Where the protocol's servers answer with another status: an argument that is not valid is 400 whatever is wrong with it."""

CODES = tuple(sorted(error.code for error in STATUS))


def problem(error: errors.CellserveError, **more: Any) -> Response:
    """The answer for an error: its code, what was found, where, and what to do; `more` are further members."""
    status, detail = STATUS[type(error)], error.detail
    if (trace_id := _note(error)) is not None:
        more["trace_id"] = trace_id
    document: dict[str, Any] = {
        "type": f"urn:cellserve:problem:{error.code}",
        "title": error.title,
        "status": status,
        "detail": detail,
        "code": error.code,
        "request_id": request_id.current.get(),
        # A member that is the whole sentence would only say it twice.
        **{name: value for name, value in error.members().items() if value != detail},
        **more,
    }
    content = orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n"
    return Response(content, status, _headers(error), MEDIA_TYPE)


def protocol_error(error: errors.CellserveError) -> Response:
    """The answer for an error where the Open Inference Protocol is spoken."""
    _note(error)
    status = STATUS[type(error)]
    return Response(
        orjson.dumps({"error": error.detail}), PROTOCOL_STATUS.get(status, status), _headers(error), "application/json"
    )


def _note(error: errors.CellserveError) -> str | None:
    """Count an error, and say it to the trace of its request; the trace's id where there is one."""
    metrics.REFUSED.labels(error.code).inc()
    if (trace := tracing.current.get()) is None:
        return None
    trace.problem = error.code
    return trace.trace_id


def form_at(path: str) -> Callable[[errors.CellserveError], Response]:
    """The form that errors have at a path."""
    return protocol_error if path == PROTOCOL_PATH or path.startswith(PROTOCOL_PATH + "/") else problem


def _headers(error: errors.CellserveError) -> dict[str, str]:
    headers = {}
    if isinstance(error, errors.QueueFull | errors.TooManyBytes | errors.DeadlineTooShort | errors.ClientBudgetSpent):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, errors.NotAuthorised):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.MethodNotAllowed):
        headers["Allow"] = error.allowed
    if isinstance(error, errors.BodyTooLarge | errors.BodyTimeout | errors.TooManyBytes | errors.ShuttingDown):
        headers["Connection"] = "close"  # the rest of the body is not going to be read
    return headers


def answer_to(error: Exception, scope: Scope) -> Response:
    """The answer for whatever was raised, in the form of the path."""
    return form_at(scope["path"])(_known(error, scope))


def _known(error: Exception, scope: Scope) -> errors.CellserveError:
    """The error that was raised, or what it is in ours: Starlette's router raises its own where it finds no endpoint."""
    if isinstance(error, errors.CellserveError):
        return error
    if isinstance(error, HTTPException) and error.status_code == 404:
        return errors.RouteNotFound()
    if isinstance(error, HTTPException) and error.status_code == 405:
        return errors.MethodNotAllowed(method=scope["method"], allowed=(error.headers or {}).get("Allow", ""))
    logger.exception("unexpected error", exc_info=error)
    return errors.CellserveError()
