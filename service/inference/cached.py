"""Runs what the answer cache does not know, and puts its answers and those that it knows in the order of the cells."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp

from service import metrics
from service.cells.columns import Columns, n_cells
from service.inference.answer_cache import AnswerCache, Layout
from service.inference.batcher import Batcher
from service.inference.fingerprints import fingerprints
from service.inference.work import Timing, Work

CHUNK_ROWS = 256
"""Cells that are put together at a time."""

QUICK_BYTES = 2**18
"""What takes less time to copy or to hash than a change of threads."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class CachedRuns:
    """A batcher behind a cache. Belongs to the batcher's event loop."""

    batcher: Batcher
    cache: AnswerCache
    executor: Executor
    """Where long work is done that is no run of a graph."""

    async def run(
        self,
        work: Work,
        counts: sp.csr_matrix,
        timing: Timing,
        deadline: float = math.inf,
        charge: Callable[[float], None] | None = None,
    ) -> AsyncGenerator[Columns]:
        """As `Batcher.run`, which gets only the cells that the cache does not know; `timing` says how many it knew."""
        started = time.perf_counter()
        n_rows = int(counts.shape[0])
        question = self.cache.question(work)
        about = question.of_genes, question.of_question, question.model_number
        keys = await self._aside(counts.data.nbytes, fingerprints, counts, *about)
        layout, records = self.cache.find(question, keys)
        missing = [row for row, record in enumerate(records) if record is None]
        timing.n_hits = n_rows - len(missing)
        metrics.CACHE_CELLS.labels("hit").inc(timing.n_hits)
        metrics.CACHE_CELLS.labels("miss").inc(len(missing))
        metrics.CACHE_LOOKUP_SECONDS.observe(time.perf_counter() - started)
        n_given = n_computed = 0
        if missing:
            unknown = counts
            if timing.n_hits:
                unknown = await self._aside(counts.data.nbytes, _rows, counts, missing)
            runs = self.batcher.run(work, unknown, timing, deadline, charge)
            async with contextlib.aclosing(runs) as chunks:
                async for columns in chunks:
                    if layout is None:
                        layout = Layout.of(columns)
                    assert layout.is_of(columns), "all chunks of one task have the same columns"
                    fresh = await self._aside(_n_bytes(layout, columns), layout.pack, columns)
                    rows = missing[n_computed : n_computed + len(fresh)]
                    self.cache.put(question, layout, [keys[row] for row in rows], fresh)
                    n_computed += len(fresh)
                    if not timing.n_hits:
                        yield columns
                        continue
                    for row, record in zip(rows, fresh, strict=True):
                        records[row] = record
                    ready = missing[n_computed] if n_computed < len(missing) else n_rows
                    while n_given < ready:
                        stop = min(ready, n_given + CHUNK_ROWS)
                        yield await self._put_together(layout, records, n_given, stop)
                        n_given = stop
            return
        assert layout is not None, "there are records, so there is their layout"
        for start in range(0, n_rows, CHUNK_ROWS):
            yield await self._put_together(layout, records, start, min(n_rows, start + CHUNK_ROWS))

    async def _put_together(self, layout: Layout, records: list[Any], start: int, stop: int) -> Columns:
        """The answers of some rows; they are no longer held here afterwards."""
        some = records[start:stop]
        records[start:stop] = [None] * len(some)
        return await self._aside(len(some) * layout.record.itemsize, layout.unpack, some)

    async def _aside(self, n_bytes: int, function: Callable[..., Found], *arguments: Any) -> Found:
        """What a function gives; in another thread where it has much to do."""
        if n_bytes <= QUICK_BYTES:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)


def _rows(counts: sp.csr_matrix, rows: list[int]) -> sp.csr_matrix:
    """These rows, as they are: what occurs twice in one stays so."""
    return counts[np.array(rows)]


def _n_bytes(layout: Layout, columns: Columns) -> int:
    return layout.record.itemsize * n_cells(columns)
