"""An answer that is sent from memory, which counts as held until the client has read it."""

import asyncio
import weakref

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.limits import Intake
from service.errors import RequestTimeout

PIECE_BYTES = 2**18
"""Sent at a time: the server takes whatever it is given into its own buffer, and waits for the client in between only."""


class HeldResponse(Response):
    """Sends its body piece by piece, as the client reads it, and gives up on a client that does not."""

    def __init__(
        self,
        content: bytes,
        headers: dict[str, str],
        media_type: str,
        *,
        intake: Intake,
        n_held: int,
        limit_seconds: float,
    ) -> None:
        """Make an answer.

        Args:
            content: the body.
            headers: beside Content-Type and Content-Length.
            media_type: of the body.
            intake: where `n_held` bytes have been held for it; they are released with this object, sent or not.
            n_held: number of those bytes.
            limit_seconds: that the client may take to read a piece.
        """
        super().__init__(content, headers=headers, media_type=media_type)
        self._limit_seconds = limit_seconds
        # Also where it is never sent, because its request was cancelled before.
        self._release = weakref.finalize(self, intake.release, n_held)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send all of it.

        Raises:
            RequestTimeout: the client has stopped reading.
        """
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), PIECE_BYTES):
                piece, is_last = self.body[start : start + PIECE_BYTES], start + PIECE_BYTES >= len(self.body)
                async with asyncio.timeout(self._limit_seconds):
                    await send({"type": "http.response.body", "body": piece, "more_body": not is_last})
        except TimeoutError:
            raise RequestTimeout(limit_seconds=self._limit_seconds) from None
        finally:
            self._release()
