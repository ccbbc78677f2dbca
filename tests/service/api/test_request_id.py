"""The request id: one per request, on the answer, in problems, in the head of answers, and in the log."""

import asyncio
import json
import logging
import re
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.types import Message, Scope

from service.api import request_id
from service.api.front import Front
from service.api.logs import JsonFormatter
from tests.builders import counts, gene_table, json_body

JSON = {"Content-Type": "application/json"}
BODY = json_body(counts(2), gene_table().gene_symbol)
OURS = re.compile(r"[0-9a-f]{32}")


async def given_for(sent: bytes) -> str:
    """The id that is set on the answer to a request with this header."""
    messages: list[Message] = []

    async def application(scope: Scope, receive: object, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", sent)]}
    await Front(application, SimpleNamespace(n_in_flight=0, is_draining=False))(scope, receive, send)  # type: ignore[arg-type]
    return Headers(raw=messages[0]["headers"])["x-request-id"]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_an_id_is_harmless(sent: bytes) -> None:
    """Whatever bytes a client sends, the id that is used is its own or ours, and cannot break a line, a header or a quote."""
    used = asyncio.run(given_for(sent))

    assert re.fullmatch(r"[A-Za-z0-9._:/+=-]{1,128}", used)
    assert used.encode() == sent or OURS.fullmatch(used)


@pytest.mark.parametrize("sent", [b"a\nb", b"a\r\nSet-Cookie: x", b"abc\n", b'{"a":1}', b"x" * 10_000, b"\xff", b" "])
async def test_unusable_ids_are_replaced(sent: bytes) -> None:
    """A line break (also a last one), quotes, 10 kB or bytes beyond ASCII get an id of ours instead."""
    assert OURS.fullmatch(await given_for(sent))


async def test_one_id_everywhere(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """The header of the answer, the head of an answer, a problem document and the log line carry one and the same id."""
    caplog.set_level(logging.INFO, "cellserve")
    # Formatted at the moment of logging, as the real handler does: the id lives in the request's context.
    caplog.handler.setFormatter(JsonFormatter())
    answer = await client.post("/v1/embed", content=BODY, headers={**JSON, "X-Request-ID": "mine/1"})
    refused = await client.post("/v1/embed", content=b"", headers=JSON)
    lines = caplog.text.splitlines()

    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine/1"
    assert refused.headers["x-request-id"] == refused.json()["request_id"]
    assert OURS.fullmatch(refused.headers["x-request-id"])
    logged = [json.loads(line)["request_id"] for line in lines if '"event":"request"' in line]
    assert logged == ["mine/1", refused.headers["x-request-id"]]


async def test_concurrent_requests_keep_their_ids(client: httpx.AsyncClient) -> None:
    """Requests that run together in one chunk do not mix up their ids."""

    async def ask(number: int) -> tuple[str, str]:
        answer = await client.post("/v1/embed", content=BODY, headers={**JSON, "X-Request-ID": f"n{number}"})
        return answer.headers["x-request-id"], answer.json()["request_id"]

    assert await asyncio.gather(*map(ask, range(30))) == [(f"n{number}", f"n{number}") for number in range(30)]


async def test_no_id_outside_of_a_request(client: httpx.AsyncClient) -> None:
    """What is logged between requests carries no id of one that is over."""
    await client.get("/livez", headers={"X-Request-ID": "mine"})
    assert request_id.current.get() is None
