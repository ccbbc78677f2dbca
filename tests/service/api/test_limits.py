"""Intake: bytes of bodies are bounded, by declaration and by counting, and given back however a request ends."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from service.api.limits import Intake
from service.errors import (
    BodyTimeout,
    BodyTooLarge,
    CellserveError,
    EmptyBody,
    MalformedBody,
    TooManyBytes,
    UnsupportedMediaType,
)


@dataclass
class SlowClient:
    """Sends a body piece by piece; notes how many were taken; may stall or leave after the last one."""

    pieces: Sequence[bytes]
    headers: dict[str, str] = field(default_factory=dict)
    then: str = "ends"
    n_taken: int = 0

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        if self.n_taken < len(self.pieces):
            self.n_taken += 1
            is_last = self.n_taken == len(self.pieces) and self.then == "ends"
            return {"type": "http.request", "body": self.pieces[self.n_taken - 1], "more_body": not is_last}
        if self.then == "stalls":
            await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    @property
    def request(self) -> Request:
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        return Request({"type": "http", "method": "POST", "headers": raw}, self.receive)


def intake(max_body_bytes: int = 100, max_bytes_in_flight: int = 200, timeout_seconds: float = 5) -> Intake:
    return Intake(max_body_bytes, max_bytes_in_flight, timeout_seconds)


async def read(intake: Intake, client: SlowClient) -> bytes:
    async with intake.body(client.request) as body:
        return body


async def refused(kind: type[Exception], intake: Intake, client: SlowClient) -> Exception:
    """The error with which a body is refused; nothing of it stays held."""
    with pytest.raises(kind) as error:
        await read(intake, client)
    assert intake._n_bytes == 0
    return error.value


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.booleans())
def test_bodies_arrive_whole_or_not_at_all(pieces: list[bytes], is_declared: bool) -> None:
    """However a body is cut, it is given in one piece, or refused as empty or too large; afterwards nothing is held."""
    content = b"".join(pieces)
    headers = {"Content-Length": str(len(content))} if is_declared else {}
    limited = intake()

    async def ask() -> bytes:
        return await read(limited, SlowClient(pieces, headers))

    if 0 < len(content) <= 100:
        assert asyncio.run(ask()) == content
    else:
        with pytest.raises(BodyTooLarge if content else EmptyBody):
            asyncio.run(ask())
    assert limited._n_bytes == 0


async def test_a_declared_length_is_enough_to_refuse() -> None:
    """Beyond the limit by its own declaration, nothing of a body is read."""
    client = SlowClient([b"x"], {"Content-Length": "101"})
    error = await refused(BodyTooLarge, intake(), client)

    assert isinstance(error, BodyTooLarge)
    assert error.limit_bytes == 100
    assert client.n_taken == 0


async def test_an_undeclared_body_is_read_up_to_the_limit() -> None:
    """A body without a length is refused with the first piece that crosses the limit."""
    client = SlowClient([b"x" * 30] * 50)
    await refused(BodyTooLarge, intake(), client)

    assert client.n_taken == 4


async def test_a_body_longer_than_declared() -> None:
    """A declaration that is too small does not let a body pass the limits."""
    await refused(BodyTooLarge, intake(), SlowClient([b"x" * 60] * 3, {"Content-Length": "1"}))
    await refused(TooManyBytes, intake(100, 70), SlowClient([b"x" * 40] * 2, {"Content-Length": "1"}))


@pytest.mark.parametrize("declared", ["", "-1", "1e3", "0x10", "12 ", "1_0", "²", "nonsense", "9" * 5000])
async def test_lengths_that_are_none(declared: str) -> None:
    """A Content-Length that is no number, or none that a body could have, is refused, never an unexpected error."""
    client = SlowClient([b"x"], {"Content-Length": declared})
    with pytest.raises(CellserveError) as error:
        await read(intake(), client)

    assert isinstance(error.value, MalformedBody | BodyTooLarge)
    assert client.n_taken == 0


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "zstd", "br", "deflate, gzip", "identity, gzip", "nonsense"])
async def test_content_encodings(encoding: str) -> None:
    """A compressed body is refused before it is read, with what may be compressed instead: a bomb has nothing to explode in."""
    client = SlowClient([b"x"], {"Content-Encoding": encoding})
    error = await refused(UnsupportedMediaType, intake(), client)

    assert "Arrow" in str(error)
    assert client.n_taken == 0
    assert await read(intake(), SlowClient([b"x"], {"Content-Encoding": " Identity "})) == b"x"


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "90"}])
async def test_a_body_that_stalls(headers: dict[str, str]) -> None:
    """A body that does not come to its end in time is given up with what had arrived, and its bytes are free again."""
    error = await refused(BodyTimeout, intake(timeout_seconds=0.05), SlowClient([b"x" * 7] * 3, headers, "stalls"))

    assert isinstance(error, BodyTimeout)
    assert (error.n_bytes, error.limit_seconds) == (21, 0.05)


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "90"}])
async def test_a_client_that_leaves_in_the_middle(headers: dict[str, str]) -> None:
    """Its bytes are free again, and nothing of the body is given."""
    await refused(ClientDisconnect, intake(), SlowClient([b"x" * 7] * 3, headers, "leaves"))


async def test_all_bodies_together() -> None:
    """Bodies that are held at a time are bounded: a declared one takes its place at once, of an undeclared one each piece does."""
    limited = intake(100, 150)
    async with limited.body(SlowClient([b"x" * 90]).request):
        assert limited._n_bytes == 90
        with pytest.raises(TooManyBytes) as error:
            await read(limited, SlowClient([b"x"], {"Content-Length": "61"}))
        assert (error.value.n_bytes, error.value.limit_bytes) == (61, 150)
        undeclared = SlowClient([b"x" * 25] * 4)
        with pytest.raises(TooManyBytes):
            await read(limited, undeclared)
        assert undeclared.n_taken == 3
        assert limited._n_bytes == 90
        assert await read(limited, SlowClient([b"x" * 60], {"Content-Length": "60"})) == b"x" * 60
    assert limited._n_bytes == 0


async def test_bytes_are_given_back_when_the_work_fails() -> None:
    """A body counts as held until its request is over, also where that ends with an error or is cancelled."""
    limited = intake()
    with suppress(ZeroDivisionError):
        async with limited.body(SlowClient([b"x" * 10]).request):
            assert limited._n_bytes == 10
            raise ZeroDivisionError
    assert limited._n_bytes == 0

    task = asyncio.create_task(read(limited, SlowClient([b"x" * 10], {"Content-Length": "50"}, "stalls")))
    await asyncio.sleep(0.01)
    assert limited._n_bytes == 50
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert limited._n_bytes == 0
