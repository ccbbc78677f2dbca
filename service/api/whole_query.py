"""POST /v1/<question>: one JSON object about all cells of a request. Bytes → cells → batcher → answer."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from service import metrics
from service.api import request_id
from service.api.access import Endpoint
from service.api.answers import json_answer, run_whole
from service.api.disconnect import cancelled_on_disconnect
from service.api.drift import observe_query
from service.api.negotiation import body_format
from service.api.state import State, state
from service.api.tasks import MODEL_OPTION, query_options, read_deadline
from service.cells.counts import Cells
from service.cells.formats import IN_MEMORY
from service.cells.formats.format import Format
from service.errors import NotRawCounts, ShuttingDown, SpeciesMismatch, TooFewGenes, TooManyCells
from service.inference import TASKS
from service.inference.model import Model
from service.inference.query import prepare
from service.inference.questions import DEPENDS_ON, Question, kept
from service.inference.task import read_options
from service.inference.work import Work

P = ParamSpec("P")
T = TypeVar("T")


def endpoint(question: Question) -> Endpoint:
    """The endpoint of a question."""

    async def answer(request: Request) -> Response:
        app = state(request)
        if app.is_draining:
            raise ShuttingDown
        if app.budgets is not None:
            app.budgets.admit(request)
        deadline = read_deadline(request)
        form = body_format(request.headers.get("content-type"), IN_MEMORY)
        model = await app.models.obtain(request.query_params.get(MODEL_OPTION), request_id.current.get())
        options = read_options(question.name, question.options, query_options(request))
        async with app.intake.body(request) as body, cancelled_on_disconnect(request):
            cells = await _in_thread(app.parsers, _read, app, form, body)
            needs_labels = question.needs_labels(model, cells, options)
            try:
                query = await _in_thread(app.parsers, prepare, model, cells)
            except (TooFewGenes, SpeciesMismatch, NotRawCounts) as error:
                if question.refused is None:
                    raise
                refused = question.refused(cells, error)
                _count(model, question, len(cells), refused)
                return json_answer(model, {"depends_on": DEPENDS_ON, **refused})
            observe_query(model, query)
            columns = None
            if needs_labels:
                task = TASKS["annotate"]
                work = Work(model=model, task=task, options=task.read_options({}, model))
                columns = await run_whole(app, work, query.counts, kept, deadline)
            found = await _in_thread(app.questions, question.answer, model, cells, query, columns, options)
            _count(model, question, len(cells), found)
            return json_answer(model, {"depends_on": DEPENDS_ON, **found})

    return answer


def _read(app: State, form: Format, body: bytes) -> Cells:
    assert form.read is not None, "one of IN_MEMORY"
    cells = form.read(body, app.max_decoded_bytes)
    if len(cells) > app.max_cells:
        raise TooManyCells(n_cells=len(cells), limit_cells=app.max_cells)
    return cells


def _count(model: Model, question: Question, n_cells: int, answer: dict[str, Any]) -> None:
    names = model.manifest.name, model.manifest.version
    metrics.CELLS.labels(*names, question.name).inc(n_cells)
    if "verdict" in answer:
        metrics.VERDICTS.labels(*names, answer["verdict"]).inc()


async def _in_thread(threads: ThreadPoolExecutor, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run a function in one of the threads."""
    return await asyncio.get_running_loop().run_in_executor(threads, lambda: function(*arguments, **named))
