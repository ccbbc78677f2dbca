"""What surrounds every endpoint: problems for whatever is raised, and nothing of the inside of the process."""

import asyncio
import json
import logging
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.api.front import AnswerBrokeOff, Front
from service.errors import NotRawCounts

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}


def state() -> Any:
    """What it needs of a process."""
    return SimpleNamespace(n_in_flight=0, is_draining=False)


async def asked(endpoint, **changes: Any) -> list[Message]:
    """What an application of one endpoint sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await Front(endpoint, state())({**SCOPE, **changes}, receive, send)
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
        await Front(halfway, state())(SCOPE, None, send)  # type: ignore[arg-type]
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
