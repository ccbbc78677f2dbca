"""A request of any length through one connection: cells are answered while others still arrive, and neither side is held whole.

The client asks for it (X-Cellserve-Stream: 1), because it must read while it writes: a server that has an answer to send and a client
that does not read wait for each other. Reading stops while the answer is not read, and so does the work.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api import problems
from service.api.pieces import PiecesResponse
from service.api.progress import Watched
from service.api.state import State
from service.cells.columns import Columns, n_cells
from service.cells.formats.arrow import ArrowWriter
from service.cells.formats.arrow_stream import Pieces
from service.errors import BodyTimeout, CellserveError, EmptyBody, TooManyBytes
from service.inference.query import Query

HEADER = "X-Cellserve-Stream"
N_AHEAD = 2
"""Pieces that are read ahead of the one that runs."""

Read = Callable[[bytes], Awaitable[Query]]
Run = Callable[[Query], AsyncGenerator[Columns]]


class DuplexResponse(PiecesResponse):
    """Its request's body is still being read while it is sent: who listens for the client's leave meanwhile would eat that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send all of it."""
        await self.send(send)


async def streamed(
    app: State,
    request: Request,
    read: Read,
    run: Run,
    head: Callable[[Query], dict[str, object]],
    headers: dict[str, str],
    watched: Watched,
) -> Response:
    """The answer to a streamed request; what is wrong with its first cells is an ordinary error.

    Args:
        app: the parts of the service.
        request: its body is not read yet.
        read: from the bytes of a piece to its cells.
        run: from cells to their answers, chunk by chunk.
        head: what the answer says before its first cell.
        headers: of the answer.
        watched: the request, for those who ask how far it is.
    """
    answers = app.progress.until_end(watched, _answers(app, request, read, run, head))
    first = await anext(answers)
    return DuplexResponse(answers, "application/vnd.apache.arrow.stream", headers, first)


async def _answers(
    app: State, request: Request, read: Read, run: Run, head: Callable[[Query], dict[str, object]]
) -> AsyncGenerator[bytes]:
    waiting: asyncio.Queue[tuple[Query | BaseException | None, int]] = asyncio.Queue(N_AHEAD)
    producer = asyncio.create_task(_produce(app, request, read, waiting))
    writer: ArrowWriter | None = None
    n_held = position = n_before = 0
    try:
        while True:
            query, n_held = await waiting.get()
            if isinstance(query, BaseException):
                raise query
            if query is None:
                break
            if writer is None:
                writer = ArrowWriter()
                writer.start(head(query))
            n_before += position
            position = 0
            async for columns in run(query):
                n_rows = n_cells(columns)
                ids = query.cell_ids[position : position + n_rows] if query.cell_ids is not None else None
                position += n_rows
                yield writer.write(columns, ids)
            app.intake.release(n_held)
            n_held = 0
        if writer is None:
            raise EmptyBody
        yield writer.end()
    except CellserveError as error:
        if writer is not None:
            # The status is out: the reason travels as the last thing before the stream breaks off. It counts cells from those on
            # that were not answered any more.
            yield writer.fail(bytes(problems.problem(error, n_cells_before=n_before + position).body))
        raise
    finally:
        app.intake.release(n_held)
        producer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await producer
        while not waiting.empty():
            app.intake.release(waiting.get_nowait()[1])


async def _produce(
    app: State, request: Request, read: Read, waiting: "asyncio.Queue[tuple[Query | BaseException | None, int]]"
) -> None:
    pieces = Pieces(app.intake.max_body_bytes)
    n_held = 0
    try:
        stream = aiter(request.stream())
        while True:
            try:
                async with asyncio.timeout(app.intake.timeout_seconds):
                    arrived = await anext(stream, None)
            except TimeoutError:
                raise BodyTimeout(n_bytes=pieces.n_held, limit_seconds=app.intake.timeout_seconds) from None
            if arrived is None:
                break
            await _hold(app, len(arrived))
            n_held += len(arrived)
            for piece in pieces.feed(arrived):
                query = await read(piece)
                taken = n_held - pieces.n_held
                n_held -= taken
                await waiting.put((query, taken))
        pieces.end()
        await waiting.put((None, 0))
    except Exception as error:  # the consumer is who answers
        await waiting.put((error, 0))
    finally:
        app.intake.release(n_held)


async def _hold(app: State, n_bytes: int) -> None:
    """Wait until there is room: not reading is what slows the client down."""
    while True:
        try:
            return app.intake.hold(n_bytes)
        except TooManyBytes:
            await asyncio.sleep(0.05)
