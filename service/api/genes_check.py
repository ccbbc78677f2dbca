"""POST /v1/genes/check: what would happen to these genes, without sending a cell."""

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from service.api import request_id
from service.api.answers import json_answer, run_whole
from service.api.disconnect import cancelled_on_disconnect
from service.api.negotiation import body_format
from service.api.state import State, state
from service.api.tasks import MODEL_OPTION, query_options
from service.cells.formats import FORMATS
from service.cells.gene_check import check_genes
from service.errors import InvalidOption, ShuttingDown
from service.inference import displacement
from service.inference.model import Model
from service.inference.task import Options
from service.inference.work import Work

_ACCEPTED = {media_type: form for media_type, form in FORMATS.items() if form.read_genes is not None}


async def check(request: Request) -> Response:
    """Matched, missing, renamed, duplicated and ambiguous genes; species; what missing genes weigh and do; whether cells would be refused."""
    app = state(request)
    if app.is_draining:
        raise ShuttingDown
    if app.budgets is not None:
        app.budgets.admit(request)
    form = body_format(request.headers.get("content-type"), _ACCEPTED)
    assert form.read_genes is not None, "one of _ACCEPTED"
    if unknown := next(iter(query_options(request)), None):
        raise InvalidOption(name=unknown[:60], problem=f"unknown; genes/check takes {MODEL_OPTION} only.")
    model = await app.models.obtain(request.query_params.get(MODEL_OPTION), request_id.current.get())
    async with app.intake.body(request) as body, cancelled_on_disconnect(request):
        loop = asyncio.get_running_loop()
        genes = await loop.run_in_executor(app.parsers, form.read_genes, body)
        found, missing = await loop.run_in_executor(app.parsers, check_genes, model.genes, genes)
        found["missing_effect_on_golden_cells"] = await _measure(app, model, missing)
    return json_answer(model, found)


async def _measure(app: State, model: Model, missing: NDArray[np.int64]) -> dict[str, Any] | None:
    """How far the golden cells move when these very genes are taken away; None where the artifact has no unit for that."""
    measured = model.manifest.missing_genes
    if measured is None or not model.golden_counts.shape[0]:
        return None
    work = Work(model=model, task=displacement.TASK, options=Options())
    columns = await run_whole(app, work, displacement.pairs(model.golden_counts, missing), dict)
    return displacement.effect(columns, measured.neighbour_distance)
