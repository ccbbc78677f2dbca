"""An answer that counts as held while it is being sent."""

import asyncio

import pytest
from starlette.types import Message

from service.api.held import PIECE_BYTES, HeldResponse
from service.api.limits import Intake
from service.errors import RequestTimeout, TooManyBytes

N_HELD = 900


def answer(intake: Intake, content: bytes = b"abc") -> HeldResponse:
    """An answer for which 900 of 1,000 bytes are held."""
    intake.hold(N_HELD)
    return HeldResponse(content, {"X-A": "b"}, "text/plain", intake=intake, n_held=N_HELD, limit_seconds=0.05)


@pytest.fixture
def intake() -> Intake:
    return Intake(max_body_bytes=1000, max_bytes_in_flight=1000, timeout_seconds=1)


def is_free(intake: Intake) -> bool:
    """Whether there is room for all of 1,000 bytes."""
    try:
        intake.hold(1000)
    except TooManyBytes:
        return False
    intake.release(1000)
    return True


@pytest.mark.parametrize("n_bytes", [1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
async def test_pieces(intake: Intake, n_bytes: int) -> None:
    """The body arrives whole, in pieces of a bounded size, and only then is its room free."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        assert not is_free(intake)
        sent.append(message)

    content = bytes(range(256)) * (n_bytes // 256 + 1)
    await answer(intake, content[:n_bytes])({"type": "http"}, None, send)  # type: ignore[arg-type]

    assert dict(sent[0]["headers"])[b"content-length"] == str(n_bytes).encode()
    assert b"".join(message["body"] for message in sent[1:]) == content[:n_bytes]
    assert max(len(message["body"]) for message in sent[1:]) <= PIECE_BYTES
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    assert is_free(intake)


async def test_a_client_that_stops_reading(intake: Intake) -> None:
    """It is given up after the limit, and its room is free again."""

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    with pytest.raises(RequestTimeout):
        await answer(intake)({"type": "http"}, None, send)  # type: ignore[arg-type]
    assert is_free(intake)


async def test_an_answer_that_is_never_sent(intake: Intake) -> None:
    """A request that is cancelled between its answer and the sending of it keeps no room."""
    made = answer(intake)
    assert not is_free(intake)
    del made
    assert is_free(intake)
