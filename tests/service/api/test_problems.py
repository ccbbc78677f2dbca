"""Problem documents: one form for every error, with a stable code, and nothing of the inside of the process."""

import asyncio
import json
import logging
import traceback
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service import errors, metrics
from service.api import problems
from service.api.problems import AnswerBrokeOff, Problems, problem
from service.errors import CellserveError, NotRawCounts

EXAMPLES: dict[Any, Any] = {int: 3, float: 0.25, str: "some {words} % with 'signs'\n", dict[str, str]: {"m@1": "ready"}}


def example(error: type[CellserveError]) -> CellserveError:
    """An error with all its fields filled in."""
    hints = get_type_hints(error)
    return error(**{field.name: EXAMPLES[hints[field.name]] for field in fields(error)})


@pytest.mark.parametrize("kind", problems.STATUS, ids=lambda kind: kind.code)
def test_every_error(kind: type[CellserveError]) -> None:
    """Each error becomes a document with its code, title, whole sentence and numbers, whatever its fields hold."""
    before = metrics.REFUSED.labels(kind.code)._value.get()
    answer = problem(example(kind))
    document = json.loads(bytes(answer.body))

    assert answer.status_code == document["status"] == problems.STATUS[kind]
    assert answer.headers["content-type"] == "application/problem+json"
    assert document["type"] == f"urn:cellserve:problem:{kind.code}"
    assert document["detail"] == example(kind).detail
    assert document["title"] == kind.title
    assert document["title"]
    for name, value in example(kind).members().items():
        assert document.get(name, document["detail"]) == value
    assert metrics.REFUSED.labels(kind.code)._value.get() == before + 1


def test_no_member_takes_the_place_of_a_standard_one() -> None:
    """A field of an error is never called as a member that RFC 9457 or we define."""
    for kind in problems.STATUS:
        assert not {field.name for field in fields(kind)} & {"type", "title", "status", "detail", "code", "request_id"}


def test_headers_that_tell_what_to_do() -> None:
    """429 says when to come back, 405 what is allowed, and where a body stays unread the connection is closed."""
    with_header = {
        header: {kind for kind in problems.STATUS if header in problem(example(kind)).headers}
        for header in ("retry-after", "allow", "connection")
    }

    assert with_header["retry-after"] == {kind for kind, status in problems.STATUS.items() if status == 429}
    assert with_header["allow"] == {errors.MethodNotAllowed}
    assert with_header["connection"] >= {errors.BodyTooLarge, errors.BodyTimeout, errors.TooManyBytes}


async def asked(endpoint, **changes: Any) -> list[Message]:
    """What an application of one endpoint sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b"", **changes}
    await Problems(endpoint)(scope, receive, send)
    return sent


async def test_an_unexpected_error(caplog: pytest.LogCaptureFixture) -> None:
    """What nobody foresaw is one and the same 500 for all; the trace goes to the log and not to the client."""

    async def broken(*_: object) -> None:
        raise KeyError("internal-name")

    start, body = await asked(broken)

    assert start["status"] == 500
    document = json.loads(body["body"])
    assert document["code"] == "internal_error"
    assert b"internal-name" not in body["body"]
    assert b"KeyError" not in body["body"]
    assert "internal-name" in caplog.text


async def test_a_client_that_left_gets_nothing() -> None:
    """There is nobody to answer, and it is no error of ours."""

    async def left(*_: object) -> None:
        raise ClientDisconnect

    assert await asked(left) == []


async def test_an_answer_that_breaks_off(caplog: pytest.LogCaptureFixture) -> None:
    """Once the status is out an error breaks the connection: no second status, no problem document inside of an answer."""
    sent: list[Message] = []

    async def halfway(scope: object, receive: object, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ZeroDivisionError

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(ZeroDivisionError):
        await Problems(halfway)({"type": "http"}, None, send)  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"]
    assert "an answer broke off" in caplog.text


async def test_what_broke_off_names_no_gene(caplog: pytest.LogCaptureFixture) -> None:
    """The log says which error broke an answer off, and the server hears no more than that: its sentence names a cell and a gene."""

    async def halfway(scope: object, receive: object, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise NotRawCounts("Cell 7 ('PATIENT-7')", "fractional", 1, "0.5", "LAPTM5", "")

    with pytest.raises(AnswerBrokeOff, match=r"^not_raw_counts$") as raised:
        await asked(halfway)
    said = caplog.text + "".join(traceback.format_exception(raised.value))
    assert "an answer broke off" in said
    assert "LAPTM5" not in said
    assert "PATIENT" not in said


async def test_cancelling_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A request that is cancelled ends as cancelled: it is not answered, and not logged as an error."""

    async def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await asked(cancelled)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("status", [400, 404, 405, 418, 500])
async def test_what_the_router_raises(status: int) -> None:
    """Every HTTPException of Starlette becomes a problem with a code of ours, and 404 and 405 their own."""

    async def raising(*_: object) -> None:
        raise HTTPException(status, "their words", {"Allow": "GET"})

    start, content = await asked(raising, method="PATCH")
    document = json.loads(content["body"])

    assert document["code"] == {404: "not_found", 405: "method_not_allowed"}.get(status, "internal_error")
    assert "their words" not in content["body"].decode()
    if status == 405:
        assert (dict(start["headers"])[b"allow"], document["method"]) == (b"GET", "PATCH")
