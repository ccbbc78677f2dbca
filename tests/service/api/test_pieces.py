"""Answers sent piece by piece: the bytes, and what a client that leaves stops."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.api.pieces import PiecesResponse

SCOPE = {"type": "http", "headers": [], "asgi": {"spec_version": "2.3"}}


async def never() -> Message:
    """A client that stays."""
    await asyncio.Event().wait()
    raise AssertionError


async def test_all_is_sent() -> None:
    """The first piece, the others, and the end, in that order."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def pieces() -> AsyncGenerator[bytes]:
        yield b"b"
        yield b"c"

    await PiecesResponse(pieces(), "text/plain", {"x-kind": "letters"}, b"a")(SCOPE, never, send)

    assert dict(sent[0]["headers"]) == {b"x-kind": b"letters", b"content-type": b"text/plain; charset=utf-8"}
    assert [(message["body"], message["more_body"]) for message in sent[1:]] == [
        (b"a", True),
        (b"b", True),
        (b"c", True),
        (b"", False),
    ]


async def test_nothing_is_made_for_a_client_that_left() -> None:
    """Also where the next piece is there at each turn of the event loop, so that who makes them is never found waiting."""
    wanted: list[asyncio.Future[None]] = []
    n_made = 0
    is_closed = False

    async def feed() -> None:
        while True:
            for future in wanted:
                future.set_result(None)
            wanted.clear()
            await asyncio.sleep(0)

    async def pieces() -> AsyncGenerator[bytes]:
        nonlocal is_closed, n_made
        try:
            while n_made < 200_000:
                wanted.append(asyncio.get_running_loop().create_future())
                await wanted[-1]
                n_made += 1
                yield b"a"
        finally:
            is_closed = True

    async def leave() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    feeder = asyncio.create_task(feed())
    try:
        with pytest.raises(ClientDisconnect):
            await PiecesResponse(pieces(), "text/plain", {})(SCOPE, leave, send)
    finally:
        feeder.cancel()

    assert is_closed
    assert 0 < n_made < 200_000
