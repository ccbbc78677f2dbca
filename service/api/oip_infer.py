"""POST /v2/models/<name>[/versions/<version>]/infer: the same queue, limits and bits as POST /v1/<task>, in tensors."""

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service import tracing
from service.api.cache_header import cache_header
from service.api.catalogue import model_of_path
from service.api.disconnect import cancelled_on_disconnect
from service.api.drift import observe_answers, observe_query
from service.api.held import HeldResponse
from service.api.oip_signature import Output, Outputs, outputs_of, tasks_for
from service.api.stages import until_queue
from service.api.state import State, state
from service.api.tasks import PARSED_AT_ONCE, measure, next_chunk, read_deadline
from service.cells.columns import Column, Columns, concatenate, n_cells
from service.cells.formats import tensors
from service.cells.formats.encodings import ENCODINGS, decoded
from service.cells.formats.tensor_cells import cells
from service.cells.formats.tensors import InferRequest
from service.errors import InvalidOption, MalformedBody, ShuttingDown, TooManyCells
from service.inference.model import Model
from service.inference.query import Query, prepare
from service.inference.task import Task
from service.inference.work import Timing, Work

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_WORD_BYTES = 64
"""What a label is taken to need in an answer, when that is estimated."""

JSON_BYTES = 16
"""What a number is taken to need in an answer of JSON."""


@dataclass(frozen=True)
class Sent:
    """A request's body and what its headers say of it."""

    body: bytes
    encoding: str
    """Content-Encoding: one of ENCODINGS, or identity."""

    header_length: int | None
    """Of the JSON, after decoding."""


async def infer(request: Request) -> Response:
    """The outputs that the client asks for, or all; as JSON, as bytes, or each as asked."""
    app = state(request)
    if app.is_draining:
        raise ShuttingDown
    if app.budgets is not None:
        app.budgets.admit(request)
    deadline, header_length = read_deadline(request), _header_length(request)
    model = await model_of_path(request)
    started = time.monotonic()
    try:
        async with app.intake.body(request, tuple(ENCODINGS)) as body, cancelled_on_disconnect(request):
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            return await _answer(app, model, Sent(body, encoding, header_length), deadline, started)
    except ClientDisconnect:
        raise
    except Exception:
        app.statistics.of(model.id).durations["fail"].add(time.monotonic() - started)
        raise


async def _answer(app: State, model: Model, sent: Sent, deadline: float, started: float) -> Response:
    arrived = time.monotonic()
    outputs = await outputs_of(app, model)
    if len(sent.body) <= PARSED_AT_ONCE and sent.encoding == "identity":
        asked, query, seconds = _read(app, model, sent)
    else:
        asked, query, seconds = await asyncio.get_running_loop().run_in_executor(app.parsers, _read, app, model, sent)
    compute_input = sum(seconds.values())
    seconds = until_queue(started, arrived, seconds)
    binary = _wanted(asked, outputs, model)
    works = _works(model, tasks_for(outputs, binary), asked.parameters)
    deadline = min(deadline, _own_deadline(asked, arrived))
    n_held = _answer_bytes(app, query.counts.shape[0], outputs, binary)
    app.intake.hold(n_held)
    try:
        columns: dict[str, Column] = {}
        timings = [Timing() for _ in works]
        for work, timing in zip(works, timings, strict=True):
            found = await _run(app, work, query, timing, deadline)
            observe_answers(model, found)
            columns |= found
        computed = time.monotonic()
        content, length = tensors.write(
            _head(model, asked, query), [(name, columns[name], is_binary) for name, is_binary in binary.items()]
        )
    except BaseException:
        app.intake.release(n_held)
        raise
    serialise_seconds = time.monotonic() - computed
    if (trace := tracing.current.get()) is not None:
        trace.stage("serialise", computed, computed + serialise_seconds)
    spent = {
        "queue": sum(timing.queue_seconds for timing in timings),
        "compute_input": compute_input,
        "compute_infer": sum(timing.compute_seconds for timing in timings),
        "compute_output": serialise_seconds,
    }
    headers = {
        "X-Cellserve-Model": model.id,
        "Server-Timing": ", ".join(f"{stage};dur={1000 * stage_seconds:.3f}" for stage, stage_seconds in spent.items()),
        **cache_header(query.counts.shape[0], *timings),
    }
    if length is not None:
        headers[HEADER_LENGTH] = str(length)
    response = HeldResponse(
        content,
        headers,
        "application/json" if length is None else "application/octet-stream",
        intake=app.intake,
        n_held=n_held,
        limit_seconds=app.timeout_seconds,
    )
    for work, timing in zip(works, timings, strict=True):
        # Reading and writing were done once, for all of them.
        is_first = work is works[0]
        measure(
            work, query.counts.shape[0], seconds if is_first else {}, timing, serialise_seconds if is_first else 0.0
        )
    observe_query(model, query)
    app.statistics.of(model.id).succeeded(query.counts.shape[0], {"success": time.monotonic() - arrived, **spent})
    return response


def _header_length(request: Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise MalformedBody(problem=f"{HEADER_LENGTH} must be a number of bytes, not '{text[:40]}'.")
    return int(text)


def _read(app: State, model: Model, sent: Sent) -> tuple[InferRequest, Query, dict[str, float]]:
    """A request and its cells, ready for the model, and the seconds that each stage took. Runs in a parser thread."""
    started = time.perf_counter()
    asked = tensors.read(decoded(sent.body, sent.encoding, app.max_decoded_bytes), sent.header_length)
    found = cells(asked.inputs, model.manifest.name, model.genes.table.gene_id, app.max_cells)
    parsed = time.perf_counter()
    query = prepare(model, found)
    return asked, query, {"parse": parsed - started, "align": time.perf_counter() - parsed}


def _wanted(asked: InferRequest, outputs: Outputs, model: Model) -> dict[str, bool]:
    """The outputs to give, in the order asked for, and whether each goes as bytes."""
    default = asked.parameters.get("binary_data_output", False)
    if type(default) is not bool:
        raise InvalidOption(name="binary_data_output", problem="it must be true or false.")
    if not asked.outputs:
        return dict.fromkeys(outputs, default)
    wanted: dict[str, bool] = {}
    for output in asked.outputs:
        if output.name not in outputs:
            known = ", ".join(outputs)
            raise InvalidOption(
                name="outputs",
                problem=f"unexpected inference output '{output.name[:60]}' for model '{model.manifest.name}'. The outputs are: {known}.",
            )
        if output.name in wanted:
            raise InvalidOption(name="outputs", problem=f"'{output.name}' is asked for twice.")
        if unknown := sorted(set(output.parameters) - {"binary_data"}):
            raise InvalidOption(
                name="outputs",
                problem=f"parameter '{unknown[0][:60]}' of '{output.name}' is not known here; classification and shared memory are not "
                "spoken (probabilities and labels are outputs of their own).",
            )
        is_binary = output.parameters.get("binary_data", default)
        if type(is_binary) is not bool:
            raise InvalidOption(name="binary_data", problem=f"of '{output.name}', it must be true or false.")
        wanted[output.name] = is_binary
    return wanted


def _works(model: Model, tasks: list[Task], parameters: Mapping[str, Any]) -> list[Work]:
    """What runs, each task with the options that it has; every parameter must be an option of one of them."""
    sent = {name: str(value) for name, value in parameters.items() if name not in ("binary_data_output", "timeout")}
    known = {name for task in tasks for name in task.options.model_fields}
    if unknown := sorted(set(sent) - known):
        raise InvalidOption(
            name=unknown[0][:60],
            problem=f"it means nothing for these outputs. Parameters here are: {', '.join(sorted({'timeout', *known}))}.",
        )
    return [
        Work(
            model=model,
            task=task,
            options=task.read_options(
                {name: value for name, value in sent.items() if name in task.options.model_fields}, model
            ),
        )
        for task in tasks
    ]


def _own_deadline(asked: InferRequest, arrived: float) -> float:
    """By the parameter `timeout`, microseconds as Triton has it, on the clock of `time.monotonic`."""
    timeout = asked.parameters.get("timeout")
    if timeout is None:
        return math.inf
    if type(timeout) is not int or not 0 < timeout <= 10**12:
        raise InvalidOption(name="timeout", problem="it must be a number of microseconds.")
    return arrived + timeout / 1e6


def _answer_bytes(app: State, n_rows: int, outputs: Outputs, binary: Mapping[str, bool]) -> int:
    """About what the answer takes: it is made whole, because its header says how long each tensor is.

    Raises:
        TooManyCells: more than a body may decode to.
    """

    def per_cell(output: Output, is_binary: bool) -> int:
        if output.datatype == "BYTES":
            return MAX_WORD_BYTES
        return math.prod(output.widths) * (4 if is_binary else JSON_BYTES)

    n_bytes = sum(per_cell(outputs[name], is_binary) for name, is_binary in binary.items())
    if n_rows * n_bytes > app.max_decoded_bytes:
        raise TooManyCells(n_cells=n_rows, limit_cells=app.max_decoded_bytes // n_bytes)
    return n_rows * n_bytes


async def _run(app: State, work: Work, query: Query, timing: Timing, deadline: float) -> Columns:
    """The whole answer of one task."""
    parts: list[Columns] = []
    n_left = query.counts.shape[0]
    runs = app.progress.follow(work, n_left, app.run(work, query.counts, timing, deadline))
    async with contextlib.aclosing(runs) as chunks:
        while n_left:
            left = max(0.0, deadline - time.monotonic()) if not parts else math.inf
            parts.append(await next_chunk(chunks, min(app.timeout_seconds, left)))
            n_left -= n_cells(parts[-1])
    return concatenate(parts)


def _head(model: Model, asked: InferRequest, query: Query) -> dict[str, Any]:
    """What the answer says besides its tensors; its parameters, what became of genes and counts, are words and numbers only."""
    about: dict[str, Any] = {
        "gene_overlap": query.genes_report.gene_overlap,
        "n_missing": query.genes_report.n_missing,
        "missing_weight": query.genes_report.missing_weight,
        "n_unknown": query.genes_report.n_unknown,
        "n_empty": query.counts_report.n_empty,
    }
    if query.counts_report.warnings:
        about["warnings"] = " ".join(query.counts_report.warnings)
    return {
        "model_name": model.manifest.name,
        "model_version": model.manifest.version,
        **({"id": asked.id} if asked.id is not None else {}),
        "parameters": about,
    }
