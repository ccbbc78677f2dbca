"""A shadow version: computes again what another version has answered, in the background, and differences become metrics.

It must not cost the request anything: it is told of an answer after that was computed, works in one thread of its own, a few cells at a time
and only while nothing waits for the runtime, and whatever goes wrong with it ends here.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service import metrics
from service.cells.columns import Column, Columns, Labels, Names, Vectors, concatenate, n_cells
from service.cells.formats.format import Format
from service.contract.store import ModelId
from service.errors import BodyTooLarge
from service.inference.batcher import Batcher
from service.inference.model import Model
from service.inference.models import Models
from service.inference.query import prepare
from service.inference.session import SHAPES
from service.inference.task import Task

logger = logging.getLogger("cellserve.shadow")
MAX_WAITING = 4
MAX_BODY_BYTES = 8 * 2**20
MAX_DECODED_BYTES = 64 * 2**20
PATIENCE_SECONDS = 2.0
"""How long a comparison waits for a moment in which nothing else runs; then it is dropped."""

Difference = tuple[NDArray[np.bool_], NDArray[np.float32] | None]
"""Per cell: whether both versions say the same, and for numbers how far they are apart."""


@dataclass(frozen=True)
class Answered:
    """An answer, and what it was an answer to."""

    model: Model
    task: Task
    options: Mapping[str, str]
    body_type: Format
    body: bytes
    columns: Columns
    """Of the first cells of the body."""


class Shadows:
    """The shadow of every model that has one. Belongs to the event loop, apart from `_compute`."""

    def __init__(self, models: Models, batcher: Batcher) -> None:
        self._models, self._batcher = models, batcher
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="cellserve-shadow")
        self._n_waiting = 0
        self._is_stopping = False

    def offer(self, answered: Answered) -> None:
        """Compare this answer with the shadow's, if there is one and there is room. Returns at once and raises nothing."""
        shadow = self._models.shadow_of(answered.model)
        if shadow is None or self._is_stopping:
            return
        if self._n_waiting >= MAX_WAITING or len(answered.body) > MAX_BODY_BYTES:
            metrics.SHADOW_REQUESTS.labels(shadow.name, shadow.version, "dropped").inc()
            return
        self._n_waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._executor, self._compute, shadow, answered)
        done.add_done_callback(partial(self._report, shadow, answered.task.name))

    def stop(self) -> None:
        """Compare no more; what runs at this moment ends at its next few cells."""
        self._is_stopping = True
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _compute(self, shadow: ModelId, answered: Answered) -> dict[str, Difference] | None:
        """Differences by column; None if the server was too busy. Runs in the shadow's thread."""
        if not self._has_turn():
            return None
        model = self._models.load_now(shadow)
        options = answered.task.read_options(answered.options, model)
        try:
            query = prepare(model, answered.body_type.read(answered.body, MAX_DECODED_BYTES))
        except BodyTooLarge:
            return None
        parts, n_rows = [], n_cells(answered.columns)
        for start in range(0, n_rows, SHAPES[-1]):
            if not self._has_turn():
                return None
            rows = query.counts[start : min(start + SHAPES[-1], n_rows)]
            parts.append(answered.task.run(model, rows, options))
        return differences(answered.columns, concatenate(parts))

    def _has_turn(self) -> bool:
        """Wait for a moment in which nothing else runs; whether there was one."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._batcher.is_idle:
            if self._is_stopping or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return not self._is_stopping

    def _report(self, shadow: ModelId, task: str, done: "asyncio.Future[dict[str, Difference] | None]") -> None:
        self._n_waiting -= 1
        if done.cancelled():
            return
        error, labels = done.exception(), (shadow.name, shadow.version)
        if error is not None:
            metrics.SHADOW_REQUESTS.labels(*labels, "failed").inc()
            logger.warning("the shadow failed", extra={"model": str(shadow), "task": task, "reason": str(error)})
            return
        found = done.result()
        metrics.SHADOW_REQUESTS.labels(*labels, "dropped" if found is None else "compared").inc()
        for column, (is_same, distance) in (found or {}).items():
            n_same = int(is_same.sum())
            metrics.SHADOW_CELLS.labels(*labels, task, column, "true").inc(n_same)
            metrics.SHADOW_CELLS.labels(*labels, task, column, "false").inc(len(is_same) - n_same)
            if distance is not None:
                metrics.SHADOW_DIFFERENCE.observe((*labels, task, column), distance)


def differences(served: Columns, shadow: Columns) -> dict[str, Difference]:
    """How two answers for the same cells differ, by column; columns that cannot be compared (other lengths, other names) are left out."""
    found = {}
    for name in served:
        difference = _difference(served[name], shadow[name]) if name in shadow else None
        if difference is not None:
            found[name] = difference
    return found


def _difference(served: Column, shadow: Column) -> Difference | None:
    if isinstance(served, Labels) or isinstance(shadow, Labels):
        if not (isinstance(served, Labels) and isinstance(shadow, Labels)):
            return None
        one, other = np.array(served.words)[served.codes], np.array(shadow.words)[shadow.codes]
        return one == other, None
    if isinstance(served, Names) or isinstance(shadow, Names):
        if not (isinstance(served, Names) and isinstance(shadow, Names)) or served.codes.shape != shadow.codes.shape:
            return None
        same = np.array(served.words)[served.codes] == np.array(shadow.words)[shadow.codes]
        return np.asarray(same.all(axis=1)), None
    if isinstance(served, Vectors) and isinstance(shadow, Vectors) and served.names != shadow.names:
        return None
    first, second = served.values, shadow.values
    if first.shape != second.shape:
        return None
    if first.dtype == np.bool_:
        return np.asarray(first == second), None
    distance = np.abs(first.astype(np.float32) - second.astype(np.float32)).reshape(len(first), -1)
    is_same = np.array(
        [one.tobytes() == other.tobytes() for one, other in zip(first, second, strict=True)], dtype=np.bool_
    )
    return is_same, np.nan_to_num(distance.max(axis=1, initial=0), nan=np.inf).astype(np.float32)
