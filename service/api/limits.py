"""Reading bodies within bounds: of one body, of all bodies at a time, and of time."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

from prometheus_client import Gauge
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from service import metrics
from service.errors import BodyTimeout, BodyTooLarge, EmptyBody, MalformedBody, TooManyBytes, UnsupportedMediaType


def declared_bytes(request: Request) -> int:
    """Bytes that a body is declared to have; 0 where it is not.

    Raises:
        MalformedBody: the declaration is no number.
    """
    declared = request.headers.get("content-length")
    if declared is not None and not re.fullmatch("[0-9]{1,18}", declared):
        raise MalformedBody(problem=f"Content-Length must be a number of bytes, not '{declared[:40]}'.")
    return int(declared) if declared is not None else 0


@dataclass
class Intake:
    """What a process takes in. Belongs to one event loop."""

    max_body_bytes: int
    max_bytes_in_flight: int
    timeout_seconds: float
    held: Gauge = metrics.BODY_BYTES_IN_FLIGHT
    """Shows the bytes that are held."""

    _n_bytes: int = 0

    @asynccontextmanager
    async def body(self, request: Request, encodings: tuple[str, ...] = ()) -> AsyncGenerator[bytes]:
        """The whole body as sent; its bytes count as held until the block is left.

        Args:
            request: whose body it is.
            encodings: Content-Encodings that the caller undoes.

        Raises:
            UnsupportedMediaType: it has another Content-Encoding.
            BodyTooLarge: more than `max_body_bytes`, by declaration before anything is read, or by counting.
            TooManyBytes: all bodies together would exceed `max_bytes_in_flight`.
            BodyTimeout: it did not arrive in time.
            EmptyBody: nothing arrived.
        """
        pieces: list[bytes] = []

        async def keep(piece: bytes) -> None:
            pieces.append(piece)

        held = Held(self, self._declared(request, encodings))
        try:
            await self._receive(request, held, keep)
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            yield body
        finally:
            held.release()

    @asynccontextmanager
    async def spool(self, request: Request, file: IO[bytes]) -> AsyncIterator[None]:
        """Write the body into an empty file; its bytes count as held until the block is left.

        Raises:
            UnsupportedMediaType, BodyTooLarge, TooManyBytes, BodyTimeout, EmptyBody: as of `body`.
        """
        loop = asyncio.get_running_loop()

        async def write(piece: bytes) -> None:
            await loop.run_in_executor(None, file.write, piece)

        held = Held(self, self._declared(request, ()))
        try:
            await self._receive(request, held, write)
            file.flush()
            yield
        finally:
            held.release()

    async def _receive(self, request: Request, held: "Held", keep: Callable[[bytes], Awaitable[None]]) -> None:
        """Hand all pieces of the body to `keep`, one after the other; errors as of `body`."""
        n_bytes, is_last = 0, False
        try:
            async with asyncio.timeout(self.timeout_seconds):
                while not is_last:
                    message = await request.receive()
                    _refuse_if_gone(message)
                    piece, is_last = message.get("body", b""), not message.get("more_body", False)
                    n_bytes += len(piece)
                    self._refuse_if_more(n_bytes)
                    held.grow(n_bytes)
                    if piece:
                        await keep(piece)
        except TimeoutError:
            raise BodyTimeout(n_bytes=n_bytes, limit_seconds=self.timeout_seconds) from None
        if not n_bytes:
            raise EmptyBody

    def _declared(self, request: Request, encodings: tuple[str, ...]) -> int:
        """Bytes that a body is declared to have, which take their place at once; 0 where it is not, and each piece takes its own."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("identity", *encodings):
            raise UnsupportedMediaType(
                header="Content-Encoding",
                found=encoding[:60],
                accepted=", ".join(encodings) or "identity (Arrow record batches may be compressed inside the stream)",
            )
        n_bytes = declared_bytes(request)
        self._refuse_if_more(n_bytes)
        return n_bytes

    def _refuse_if_more(self, n_bytes: int) -> None:
        if n_bytes > self.max_body_bytes:
            raise BodyTooLarge(limit_bytes=self.max_body_bytes)

    def hold(self, n_bytes: int) -> None:
        """Take room for bytes.

        Raises:
            TooManyBytes: there is none.
        """
        if self._n_bytes + n_bytes > self.max_bytes_in_flight:
            raise TooManyBytes(n_bytes=n_bytes, limit_bytes=self.max_bytes_in_flight, retry_after_seconds=1)
        self._n_bytes += n_bytes
        self.held.inc(n_bytes)

    def release(self, n_bytes: int) -> None:
        """Give room back."""
        self._n_bytes -= n_bytes
        self.held.dec(n_bytes)


class Held:
    """Bytes that an intake holds until they are released."""

    def __init__(self, intake: Intake, n_bytes: int) -> None:
        """Hold so many from now on; raises as `Intake.hold`."""
        intake.hold(n_bytes)
        self._intake, self._n_bytes = intake, n_bytes

    def grow(self, n_bytes: int) -> None:
        """Hold so many in all, if it is more; raises as `Intake.hold`."""
        if n_bytes > self._n_bytes:
            self._intake.hold(n_bytes - self._n_bytes)
            self._n_bytes = n_bytes

    def release(self) -> None:
        """Give the room back."""
        self._intake.release(self._n_bytes)


def _refuse_if_gone(message: Message) -> None:
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
