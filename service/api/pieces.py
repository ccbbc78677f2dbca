"""Answers that are sent piece by piece, as they are made."""

import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.disconnect import cancelled_on_disconnect


class PiecesResponse(Response):
    """Sends pieces as they are made, and has no more made when the client leaves.

    Starlette's own hands that to anyio, which cancels only what it finds waiting: an answer whose next piece is always there is made to
    its end for nobody, with the event loop busy trying.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes], media_type: str, headers: dict[str, str], first: bytes = b""
    ) -> None:
        """Make an answer of `first`, if it is not empty, and `pieces`, which are closed when all is sent."""
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._first, self._pieces = first, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it.

        Raises:
            ClientDisconnect: the client left.
        """
        async with cancelled_on_disconnect(Request(scope, receive)):
            await self.send(send)

    async def send(self, send: Send) -> None:
        """Send all of it to whoever is there or not."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._pieces):
            if self._first:
                await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
