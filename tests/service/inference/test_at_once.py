"""A few cells with nobody beside them run without the queue; whoever has company, or is not quick, is left to it."""

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from service import metrics
from service.cells.columns import Columns, Values
from service.errors import DeadlinePassed, ShuttingDown
from service.inference import batcher as module
from service.inference.batcher import LOOKS, Batcher, run_whole
from service.inference.here import Here
from service.inference.model import Model
from service.inference.task import Options, Task
from service.inference.work import Timing, Work

QUICK_SECONDS = 0.5
"""Generous: what is quick here must be so on a machine that has other things to do."""


class FirstCount:
    """Answers each cell with its first count, and notes what ran together."""

    def __init__(self) -> None:
        self.chunks: list[list[float]] = []
        self.error: Exception | None = None

    def run(self, model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
        if self.error is not None:
            raise self.error
        self.chunks.append(counts.data.tolist())
        return {"first": Values(counts.data)}


def cells(*first: float) -> sp.csr_matrix:
    return sp.csr_matrix(np.array([[value] for value in first], dtype=np.float32))


def values(columns: Columns) -> list[float]:
    column = columns["first"]
    assert isinstance(column, Values)
    return column.values.tolist()


@pytest.fixture
async def batcher() -> AsyncIterator[Batcher]:
    started = Batcher(batch_rows=256, max_queue_rows=1000, here=Here(seconds=QUICK_SECONDS))
    started.start()
    yield started
    await started.stop()


@pytest.fixture
def task() -> FirstCount:
    return FirstCount()


@pytest.fixture
async def work(batcher: Batcher, task: FirstCount, tiny: Model) -> Work:
    """Of a task that has been quick."""
    made = Work(tiny, Task(name="at_once", summary="", description="", graphs=(), run=task.run), Options())
    for numbers in ((1,), (1, 2)):
        await run_whole(batcher, made, cells(*numbers))
    task.chunks.clear()
    return made


async def asked(batcher: Batcher, work: Work, *first: float, **more: Any) -> list[float] | None:
    """The answer that is given at once."""
    columns = await batcher.at_once(work, cells(*first), Timing(), **more)
    return None if columns is None else values(columns)


async def test_nobody_else(batcher: Batcher, work: Work, task: FirstCount, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered though the queue's task does nothing, measured like what was queued, and charged."""
    monkeypatch.setattr(batcher, "_enqueue", None)
    timing, charged = Timing(), []
    before = metrics.BATCHES.labels("at_once", "idle")._value.get()
    columns = await batcher.at_once(work, cells(7, 8), timing, charge=charged.append)
    await asyncio.sleep(0)

    assert columns is not None
    assert values(columns) == [7, 8]
    assert task.chunks == [[7, 8]]
    assert metrics.BATCHES.labels("at_once", "idle")._value.get() == before + 1
    assert timing.compute_seconds == sum(charged) > 0
    assert timing.queue_seconds > 0
    assert batcher.is_idle


async def test_company_in_the_same_turn(batcher: Batcher, work: Work, task: FirstCount) -> None:
    """Those that come together are sent to the queue, all of them, and run together there; the next one is alone again."""

    async def either(value: float) -> list[float]:
        found = await asked(batcher, work, value)
        if found is not None:
            return found
        return values(await run_whole(batcher, work, cells(value)))

    assert await asyncio.gather(*map(either, (3, 4, 5))) == [[3], [4], [5]]
    assert task.chunks == [[3, 4, 5]]
    assert await asked(batcher, work, 6) == [6]


async def test_who_is_alone_for_long_looks_now_and_then(batcher: Batcher, work: Work, task: FirstCount) -> None:
    """After some without company a request runs in the turn in which it came; one of a few finds company, and then each looks again."""
    for number in range(LOOKS + 2):
        assert await asked(batcher, work, number + 1) == [number + 1]
    task.chunks.clear()
    first, second = batcher.at_once(work, cells(1), Timing()), batcher.at_once(work, cells(2), Timing())
    for one in (first, second):
        with pytest.raises(StopIteration) as ended:
            one.send(None)
        assert ended.value.value is not None
    assert task.chunks == [[1], [2]]

    n_together = 0
    for _ in range(LOOKS):
        first, _ = await asyncio.gather(asked(batcher, work, 1), asked(batcher, work, 2))
        n_together += first is None  # it would be in the queue now, where the second one would join it
    assert n_together >= LOOKS // 2


async def test_who_waits_goes_first(batcher: Batcher, work: Work, task: FirstCount) -> None:
    """While others wait, or run, nobody overtakes them."""
    waiting = asyncio.create_task(run_whole(batcher, work, cells(*range(600))))
    await asyncio.sleep(0)
    assert await asked(batcher, work, 1) is None
    batcher._running_since = time.monotonic()
    batcher._lanes.clear()
    assert await asked(batcher, work, 1) is None
    batcher._running_since = None
    waiting.cancel()


async def test_what_is_left_to_the_queue(
    batcher: Batcher, work: Work, tiny: Model, task: FirstCount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many cells, and cells of a task that was slow, or has not run yet."""
    assert await asked(batcher, work, *range(65)) is None
    slow = Work(
        tiny,
        Task(
            name="slow",
            summary="",
            description="",
            graphs=(),
            run=lambda *_: time.sleep(1.1 * QUICK_SECONDS) or task.run(*_),
        ),
        Options(),
    )  # type: ignore[func-returns-value]
    assert await asked(batcher, slow, 1) is None
    await run_whole(batcher, slow, cells(1))
    assert await asked(batcher, slow, 1) is None


async def test_it_learns_that_it_is_slow(
    batcher: Batcher, work: Work, task: FirstCount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that takes long is the last one in the event loop."""
    run = module._compute
    monkeypatch.setattr(module, "_compute", lambda pieces: time.sleep(1.1 * QUICK_SECONDS) or run(pieces))
    assert await asked(batcher, work, 1) == [1]
    assert await asked(batcher, work, 1) is None


async def test_the_queue_keeps_nothing_of_what_it_ran(batcher: Batcher, work: Work) -> None:
    """Its task may not run for long where all is answered at once, and a model that it held could not be unloaded."""
    matrix = cells(1)
    held = weakref.ref(matrix)
    await run_whole(batcher, work, matrix)
    del matrix
    for _ in range(3):
        await asyncio.sleep(0)
    assert held() is None


async def test_refusals(batcher: Batcher, work: Work, task: FirstCount) -> None:
    """A deadline that has passed, an error of the task, and the end of the process are told to who asks."""
    with pytest.raises(DeadlinePassed):
        await asked(batcher, work, 1, deadline=time.monotonic() - 1)
    task.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        await asked(batcher, work, 1)
    task.error = None
    assert await asked(batcher, work, 1) == [1]
    await batcher.stop()
    with pytest.raises(ShuttingDown):
        await asked(batcher, work, 1)


async def test_a_client_that_leaves(batcher: Batcher, work: Work, task: FirstCount) -> None:
    """One that is cancelled before its turn runs nothing, and is no company for the next."""
    leaving = asyncio.create_task(asked(batcher, work, 1))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled() or leaving.result() == [1]
    assert await asked(batcher, work, 2) == [2]
    assert batcher._n_at_once == 0
