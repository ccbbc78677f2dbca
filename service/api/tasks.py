"""POST /v1/<task>: the same steps for every task of TASKS. Bytes → cells → batcher → columns → bytes."""

import asyncio
import contextlib
import math
import re
import time
from collections.abc import AsyncGenerator, Callable

from starlette.requests import Request
from starlette.responses import Response

from service import metrics, tracing
from service.api import request_id, streaming
from service.api.access import Endpoint
from service.api.cache_header import cache_header
from service.api.disconnect import cancelled_on_disconnect
from service.api.drift import observe_answers, observe_query
from service.api.limits import declared_bytes
from service.api.negotiation import answer_format, body_format
from service.api.pieces import PiecesResponse
from service.api.stages import until_queue
from service.api.state import State, state
from service.api.uploads import read_places
from service.cells.columns import Columns, n_cells
from service.cells.formats.arrow import FORMAT as ARROW
from service.cells.formats.arrow import new_bytes
from service.cells.formats.arrow_limits import is_compressed
from service.cells.formats.format import Format, Writer
from service.errors import (
    InvalidOption,
    RequestTimeout,
    ShuttingDown,
    TaskNotOffered,
    TooManyCells,
    UnsupportedMediaType,
)
from service.inference import TASKS
from service.inference.here import after_answers
from service.inference.model import Model
from service.inference.query import Query, prepare
from service.inference.shadow import Answered
from service.inference.task import Task
from service.inference.work import Timing, Work

MODEL_OPTION = "model"
TIMEOUT_HEADER = "X-Request-Timeout"
LONG_BYTES = 2**17
"""A body of more bytes holds more cells than go before others; where those would be refused, it is not read."""

PARSED_AT_ONCE = 64 * 2**10
"""Bytes of a body that is parsed in the event loop: a few cells, which take less time than a change of threads."""


def endpoint(task: Task) -> Endpoint:
    """The endpoint of a task."""

    async def answer(request: Request) -> Response:
        app = state(request)
        if app.is_draining:
            raise ShuttingDown
        if app.budgets is not None:
            app.budgets.admit(request)
        deadline = read_deadline(request)
        # Everything that can be refused without the body is, before it is read, and what is refused most often comes first.
        body_type = body_format(request.headers.get("content-type"))
        is_streamed = request.headers.get(streaming.HEADER) == "1"
        if not is_streamed and not body_type.is_file and declared_bytes(request) > LONG_BYTES:
            app.batcher.check_room(deadline)
        answer_type = answer_format(request.headers.get("accept"), body_type)
        model = await find_model(app, request, task)
        options, places = _split(query_options(request), body_type)
        work = Work(model=model, task=task, options=task.read_options(options, model))
        if is_streamed:
            return await _stream(app, request, work, body_type, answer_type)
        if body_type.is_file:
            async with app.uploads.query(request, model, read_places(places)) as (query, seconds):
                # What was sent is not there any more for a shadow to compute it again.
                return await _answer(app, work, query, seconds, answer_type, deadline, lambda _: None)
        started = time.monotonic()
        async with app.intake.body(request) as body:
            received = time.monotonic()

            def answered(first: Columns) -> None:
                app.shadows.offer(Answered(model, task, options, body_type, body, first))

            n_bytes = new_bytes(body) if body_type is ARROW else len(body)
            if n_bytes <= PARSED_AT_ONCE and not answer_type.is_file:
                query, seconds = _read(app, model, body_type, body)
                seconds, timing = until_queue(started, received, seconds), Timing()
                if (columns := await app.at_once(work, query.counts, timing, deadline)) is not None:
                    # Nothing was waited for, so that nobody can have left meanwhile.
                    answered(columns)
                    return _whole(work, query, seconds, timing, columns, answer_type)
                async with cancelled_on_disconnect(request):
                    return await _answer(app, work, query, seconds, answer_type, deadline, answered)
            async with cancelled_on_disconnect(request):
                with app.batcher.coming(deadline) if len(body) > LONG_BYTES else contextlib.nullcontext():
                    if _is_parsed_here(app, body_type, body):
                        query, seconds = _read(app, model, body_type, body)
                    else:
                        loop = asyncio.get_running_loop()
                        query, seconds = await loop.run_in_executor(app.parsers, _read, app, model, body_type, body)
                seconds = until_queue(started, received, seconds)
                return await _answer(app, work, query, seconds, answer_type, deadline, answered)

    return answer


async def find_model(app: State, request: Request, task: Task) -> Model:
    """The version that answers what the query names, if it offers the task; loaded for it where it was unloaded.

    Raises:
        ModelNotFound, ModelNotReady, TaskNotOffered.
        RequestTimeout: it could not be loaded in time.
    """
    try:
        model = await app.models.obtain(
            request.query_params.get(MODEL_OPTION), request_id.current.get(), app.timeout_seconds
        )
    except TimeoutError:
        raise RequestTimeout(limit_seconds=app.timeout_seconds) from None
    if not offers(model, task):
        offered = ", ".join(other.name for other in TASKS.values() if offers(model, other))
        raise TaskNotOffered(model=model.id, task=task.name, offered=offered)
    return model


def offers(model: Model, task: Task) -> bool:
    """Whether a model has all graphs, and the reference cells, that a task needs."""
    return task.offered_by(model)


def query_options(request: Request) -> dict[str, str]:
    """The task's options in the query.

    Raises:
        InvalidOption: an option is given more than once.
    """
    items = request.query_params.multi_items()
    names = [name for name, _ in items]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidOption(name=twice[:60], problem="it is given more than once.")
    return {name: value for name, value in items if name != MODEL_OPTION}


def _split(options: dict[str, str], body_type: Format) -> tuple[dict[str, str], dict[str, str]]:
    """Options of the task, and those that say how the body is to be read."""
    of_body = body_type.options.model_fields if body_type.options is not None else {}
    return (
        {name: value for name, value in options.items() if name not in of_body},
        {name: value for name, value in options.items() if name in of_body},
    )


def read_deadline(request: Request) -> float:
    """When the answer is of no more use to the client, on the clock of `time.monotonic`; infinity where it does not say.

    Raises:
        InvalidOption: X-Request-Timeout is not a number of seconds.
    """
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return math.inf
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
        raise InvalidOption(name=TIMEOUT_HEADER, problem=f"it must be a number of seconds, not '{text[:40]}'.")
    return time.monotonic() + float(text)


def _is_parsed_here(app: State, body_type: Format, body: bytes) -> bool:
    """Whether reading the body keeps the event loop for no longer than is allowed."""
    return len(body) <= PARSED_AT_ONCE or (
        body_type is ARROW and len(body) <= app.here.arrow_bytes and not is_compressed(body)
    )


def _read(app: State, model: Model, body_type: Format, body: bytes) -> tuple[Query, dict[str, float]]:
    """A request's cells, ready for the model, and the seconds that each stage took."""
    assert body_type.read is not None, "a file is read elsewhere"
    started = time.perf_counter()
    cells = body_type.read(body, app.max_decoded_bytes)
    if len(cells) > app.max_cells:
        raise TooManyCells(n_cells=len(cells), limit_cells=app.max_cells)
    parsed = time.perf_counter()
    query = prepare(model, cells)
    return query, {"parse": parsed - started, "align": time.perf_counter() - parsed}


async def _stream(app: State, request: Request, work: Work, body_type: Format, answer_type: Format) -> Response:
    """Answer cells while others still arrive; see streaming.py."""
    for header, chosen in (("Content-Type", body_type), ("Accept", answer_type)):
        if chosen is not ARROW:
            raise UnsupportedMediaType(
                header=header, found=chosen.media_type, accepted=f"{ARROW.media_type}, where {streaming.HEADER} is 1"
            )
    loop = asyncio.get_running_loop()
    seconds_of: dict[int, dict[str, float]] = {}
    watched = app.progress.begin(work)

    async def read(piece: bytes) -> Query:
        received = time.monotonic()
        query, seconds = await loop.run_in_executor(app.parsers, _read, app, work.model, body_type, piece)
        # Waiting for the client to send more is no stage: it may be waiting for us to answer.
        seconds_of[id(query)] = until_queue(received, received, seconds)
        watched.n_received += query.counts.shape[0]
        return query

    async def run(query: Query) -> AsyncGenerator[Columns]:
        timing = Timing()
        if app.budgets is not None and watched.n_answered:
            await app.budgets.wait(app.timeout_seconds)
        for_cells = query.counts.shape[0]
        async with contextlib.aclosing(app.run(work, query.counts, timing)) as chunks:
            while for_cells:
                columns = await next_chunk(chunks, app.timeout_seconds)
                observe_answers(work.model, columns)
                for_cells -= n_cells(columns)
                watched.n_answered += n_cells(columns)
                yield columns
        measure(work, query.counts.shape[0], seconds_of.pop(id(query)), timing, 0.0)
        observe_query(work.model, query)

    def head(query: Query) -> dict[str, object]:
        said = query.head(work.model, work.task, work.options, request_id.current.get())
        # How many cells will come is not known; what their values looked like, of the first of them only.
        return {**said, "counts": {**said["counts"], "n_cells": None, "n_empty": None}}

    return await streaming.streamed(app, request, read, run, head, {"X-Cellserve-Model": work.model.id}, watched)


async def _answer(
    app: State,
    work: Work,
    query: Query,
    seconds: dict[str, float],
    answer_type: Format,
    deadline: float,
    answered: Callable[[Columns], None],
) -> Response:
    """Compute the first chunk, so that what can go wrong has gone wrong before the status is sent; stream the rest."""
    timing, n_rows = Timing(), query.counts.shape[0]
    chunks = app.progress.follow(work, n_rows, app.run(work, query.counts, timing, deadline))
    first = await next_chunk(chunks, min(app.timeout_seconds, max(0.0, deadline - time.monotonic())))
    answered(first)
    if n_cells(first) == n_rows and not answer_type.is_file:
        await chunks.aclose()  # left to the garbage it would be closed by a task of its own
        return _whole(work, query, seconds, timing, first, answer_type)
    headers = _headers(work, query, seconds, timing)
    pieces = _pieces(app, work, query, answer_type.writer(), seconds, timing, first, chunks)
    if answer_type.is_file:
        return await app.uploads.respond(pieces, headers, answer_type.media_type, app.timeout_seconds)
    return PiecesResponse(pieces, answer_type.media_type, headers)


def _whole(
    work: Work, query: Query, seconds: dict[str, float], timing: Timing, columns: Columns, answer_type: Format
) -> Response:
    """The answer for cells of which all are computed."""
    began, started = time.monotonic(), time.perf_counter()
    after_answers(observe_answers, work.model, columns)
    writer = answer_type.writer()
    lead = writer.start(query.head(work.model, work.task, work.options, request_id.current.get()))
    content = lead + writer.write(columns, query.cell_ids) + writer.end()
    _written(work, query, seconds, timing, began, time.perf_counter() - started)
    return Response(content, headers=_headers(work, query, seconds, timing), media_type=answer_type.media_type)


def _headers(work: Work, query: Query, seconds: dict[str, float], timing: Timing) -> dict[str, str]:
    """Of an answer; of a streamed one the times are those until its first chunk."""
    spent = {**seconds, "queue": timing.queue_seconds, "compute": timing.compute_seconds}
    return {
        "X-Cellserve-Model": work.model.id,
        "Server-Timing": ", ".join([f"{stage};dur={1000 * taken:.3f}" for stage, taken in spent.items()]),
        **cache_header(query.counts.shape[0], timing),
    }


def _written(
    work: Work, query: Query, seconds: dict[str, float], timing: Timing, began: float, serialise_seconds: float
) -> None:
    """Count an answer of which all is written, in so many seconds since it began."""
    after_answers(measure, work, query.counts.shape[0], seconds, timing, serialise_seconds)
    after_answers(observe_query, work.model, query)
    if (trace := tracing.current.get()) is not None:
        trace.stage("serialise", began, time.monotonic(), {"cellserve.busy_seconds": serialise_seconds})


async def _pieces(
    app: State,
    work: Work,
    query: Query,
    writer: Writer,
    seconds: dict[str, float],
    timing: Timing,
    columns: Columns,
    chunks: AsyncGenerator[Columns],
) -> AsyncGenerator[bytes]:
    """The bytes of the answer, one piece per chunk; `columns` is the first."""
    serialise_seconds, position, began = 0.0, 0, time.monotonic()
    lead = writer.start(query.head(work.model, work.task, work.options, request_id.current.get()))
    # Nobody asks for the end after the last chunk, and what is left to the garbage is closed by a task of its own.
    async with contextlib.aclosing(chunks):
        while True:
            started = time.perf_counter()
            stop = position + n_cells(columns)
            after_answers(observe_answers, work.model, columns)
            piece = writer.write(columns, query.cell_ids[position:stop] if query.cell_ids is not None else None)
            position = stop
            is_last = position == query.counts.shape[0]
            piece = lead + piece + (writer.end() if is_last else b"")
            lead = b""
            serialise_seconds += time.perf_counter() - started
            if is_last:
                _written(work, query, seconds, timing, began, serialise_seconds)
            yield piece
            if is_last:
                return
            columns = await next_chunk(chunks, app.timeout_seconds)


async def next_chunk(chunks: AsyncGenerator[Columns], limit_seconds: float) -> Columns:
    """The next chunk of an answer.

    Raises:
        RequestTimeout: it took too long.
    """
    try:
        async with asyncio.timeout(limit_seconds):
            return await anext(chunks)
    except TimeoutError:
        raise RequestTimeout(limit_seconds=limit_seconds) from None


def measure(work: Work, n_rows: int, seconds: dict[str, float], timing: Timing, serialise_seconds: float) -> None:
    """Count an answer: where its time went, and its cells."""
    spent = {
        **seconds,
        "queue": timing.queue_seconds,
        "compute": timing.compute_seconds,
        "serialise": serialise_seconds,
    }
    for stage, stage_seconds in spent.items():
        metrics.series(metrics.STAGE_SECONDS, work.task.name, stage).observe(stage_seconds)
    manifest = work.model.manifest
    metrics.series(metrics.CELLS, manifest.name, manifest.version, work.task.name).inc(n_rows)
