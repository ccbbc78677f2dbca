"""Answers about a whole request: one JSON object, and the columns of all cells behind it."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import orjson
import scipy.sparse as sp
from starlette.responses import Response

from service.api import request_id
from service.api.state import State
from service.api.tasks import next_chunk
from service.cells.columns import Columns, concatenate, n_cells
from service.inference.model import Model
from service.inference.work import Timing, Work


def json_answer(model: Model, content: dict[str, Any]) -> Response:
    """An object with the model and the request id before the rest."""
    document = {
        "model": {"name": model.manifest.name, "version": model.manifest.version},
        "request_id": request_id.current.get(),
        **content,
    }
    body = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n"
    return Response(body, headers={"X-Cellserve-Model": model.id}, media_type="application/json")


async def run_whole(
    app: State, work: Work, counts: sp.csr_matrix, reduce: Callable[[Columns], Columns], deadline: float = math.inf
) -> Columns:
    """What `reduce` makes of the answer of each chunk of cells, for all cells; the rest is dropped chunk by chunk.

    Raises:
        as `Batcher.run` does.
        RequestTimeout: a chunk took too long.
    """
    parts, n_left = [], int(counts.shape[0])
    async with contextlib.aclosing(app.run(work, counts, Timing(), deadline)) as chunks:
        while n_left:
            columns = await next_chunk(chunks, min(app.timeout_seconds, max(0.0, deadline - time.monotonic())))
            n_left -= n_cells(columns)
            parts.append(reduce(columns))
    return concatenate(parts)
