"""Runs behind a cache: the same bits in every state, only what is missing is run, and refusals come before the first answer."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.columns import Columns, LabelLists, arrays, concatenate, n_cells
from service.contract import artifact
from service.errors import QueueFull
from service.inference import TASKS, cached
from service.inference.answer_cache import AnswerCache
from service.inference.batcher import Batcher
from service.inference.cached import CachedRuns
from service.inference.model import Model, load
from service.inference.session import Runtime
from service.inference.task import Options
from service.inference.work import Timing, Work
from tests.builders import counts, write_artifact

CELLS = counts(60, seed=3)


class Runs:
    """A cache over a real batcher; notes how many rows were run."""

    def __init__(self, max_bytes: int = 2**24, batch_rows: int = 256, max_queue_rows: int = 10_000) -> None:
        self.batcher = Batcher(batch_rows=batch_rows, max_queue_rows=max_queue_rows)
        self.cache = AnswerCache(max_bytes)
        self._executor = ThreadPoolExecutor(1)
        self.runs = CachedRuns(self.batcher, self.cache, self._executor)
        self.costs: list[float] = []

    async def __aenter__(self) -> "Runs":
        self.batcher.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.batcher.stop()
        self._executor.shutdown()

    async def ask(self, work: Work, matrix: sp.csr_matrix) -> tuple[Columns, int]:
        """The whole answer, and how many cells were known."""
        timing = Timing()
        parts = [columns async for columns in self.runs.run(work, matrix, timing, charge=self.costs.append)]
        assert sum(map(n_cells, parts)) == matrix.shape[0]
        assert timing.n_hits is not None
        return concatenate(parts), timing.n_hits

    @property
    def n_run(self) -> int:
        """Rows that the runtime was given."""
        return sum(n_rows * runs.n_runs for kinds in self.batcher.runs.values() for n_rows, runs in kinds.items())


@pytest.fixture
async def started() -> AsyncIterator[Runs]:
    async with Runs() as runs:
        yield runs


def work_of(model: Model, task: str, **options: str) -> Work:
    return Work(model, TASKS[task], TASKS[task].read_options(options, model))


def assert_same(answer: Columns, expected: Columns, rows: object = slice(None)) -> None:
    assert list(answer) == list(expected)
    for name, array in arrays(expected).items():
        assert arrays(answer)[name].tobytes() == array[rows].tobytes(), name


@pytest.mark.parametrize("task", TASKS)
async def test_cold_warm_and_partly_warm(started: Runs, tiny: Model, task: str) -> None:
    """Every task, bit by bit: nothing known, all known, some known among others, in another order, twice in one request."""
    work = work_of(tiny, task)
    expected = work.task.run(tiny, CELLS, work.options)
    cold, n_hits = await started.ask(work, CELLS[:40])
    assert_same(cold, expected, slice(0, 40))
    assert (n_hits, started.n_run) == (0, 40)
    warm, n_hits = await started.ask(work, CELLS[:40])
    assert_same(warm, expected, slice(0, 40))
    assert (n_hits, started.n_run) == (40, 40)
    rows = np.array([50, 3, 3, 55, 56, 39, 0, 59])
    mixed, n_hits = await started.ask(work, CELLS[rows])
    assert_same(mixed, expected, rows)
    assert (n_hits, started.n_run) == (4, 44)


async def test_lists_of_words(started: Runs, calibrated: Model) -> None:
    """Sets of labels, whose number differs from cell to cell, come from the cache as they were computed."""
    work = work_of(calibrated, "annotate", coverage="0.8", top_k="2")
    expected = work.task.run(calibrated, CELLS, work.options)
    for rows in (np.arange(40), np.array([50, 3, 39]), np.arange(60)):
        answer, _ = await started.ask(work, CELLS[rows])
        assert_same(answer, expected, rows)
    sets = expected["prediction_set"]
    assert isinstance(sets, LabelLists)
    assert len({len(labels) for labels in sets.lists()}) > 1
    assert answer["prediction_set"].lists() == sets.lists()


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=90), min_size=1, max_size=6),
    max_bytes=st.sampled_from([0, 4_000, 12_000, 2**20]),
    batch_rows=st.sampled_from([1, 7, 256]),
)
def test_any_requests_in_any_state(tiny: Model, requests: list[list[int]], max_bytes: int, batch_rows: int) -> None:
    """Whatever was asked before and has been evicted since, in whatever chunks, cells have the bits that the task gives them."""
    work = work_of(tiny, "annotate")
    expected = work.task.run(tiny, CELLS, work.options)

    async def ask_all() -> None:
        async with Runs(max_bytes, batch_rows) as runs:
            for rows in requests:
                answer, _ = await runs.ask(work, CELLS[rows])
                assert_same(answer, expected, rows)
                assert runs.cache.n_bytes <= max(max_bytes, 2_000)

    asyncio.run(ask_all())


async def test_in_pieces_and_other_threads(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long request whose parts are known here and there, put together a few at a time, aside from the event loop."""
    monkeypatch.setattr(cached, "QUICK_BYTES", 0)
    monkeypatch.setattr(cached, "CHUNK_ROWS", 16)
    many = counts(500, seed=4)
    work = work_of(tiny, "reconstruct")
    expected = work.task.run(tiny, many, work.options)
    known = np.flatnonzero(np.random.default_rng(0).random(500) < 0.4)
    async with Runs(batch_rows=32) as runs:
        await runs.ask(work, many[known])
        answer, n_hits = await runs.ask(work, many)
        assert n_hits == len(known)
        assert_same(answer, expected)
        assert runs.n_run == 500
        sizes = [n_cells(columns) async for columns in runs.runs.run(work, many, Timing())]
        assert max(sizes) == 16


async def test_options_and_tasks_do_not_mix(started: Runs, tiny: Model) -> None:
    """The same cells with another task or other options are other questions."""
    for work in (
        work_of(tiny, "embed"),
        work_of(tiny, "reconstruct"),
        work_of(tiny, "reconstruct", library_size="100"),
        work_of(tiny, "reconstruct", genes="G1,G2"),
    ):
        for n_known in (0, 60):
            answer, n_hits = await started.ask(work, CELLS)
            assert n_hits == n_known
            assert_same(answer, work.task.run(tiny, CELLS, work.options))


async def test_models_do_not_mix(started: Runs, tiny: Model, tmp_path: Path) -> None:
    """Another model of the same name and version (from another store) has its own answers."""
    other = load(artifact.read(write_artifact(tmp_path, seed=9)), Runtime())
    assert other.id == tiny.id
    await started.ask(work_of(tiny, "embed"), CELLS)
    answer, n_hits = await started.ask(work_of(other, "embed"), CELLS)

    assert n_hits == 0
    assert_same(answer, TASKS["embed"].run(other, CELLS, Options()))


async def test_a_refusal_comes_first(tiny: Model) -> None:
    """A full queue refuses the request before anything of it is answered; what is known needs no room in the queue."""
    work = work_of(tiny, "embed")
    async with Runs(max_queue_rows=30) as runs:
        await runs.ask(work, CELLS[:29])
        given = []
        with pytest.raises(QueueFull) as refused:
            given.extend(
                [columns async for columns in runs.runs.run(work, sp.vstack([CELLS[:5], CELLS[29:]]), Timing())]
            )
        assert not given
        assert refused.value.n_cells == 31
        answer, n_hits = await runs.ask(work, CELLS[:59])
        assert n_hits == 29
        assert_same(answer, work.task.run(tiny, CELLS[:59], Options()))


async def test_a_hit_costs_its_client_nothing(started: Runs, tiny: Model) -> None:
    """Only what runs is charged."""
    await started.ask(work_of(tiny, "embed"), CELLS)
    before = len(started.costs)
    await started.ask(work_of(tiny, "embed"), CELLS)

    assert before
    assert min(started.costs) > 0
    assert len(started.costs) == before


async def test_leaving_in_the_middle(tiny: Model) -> None:
    """A client that leaves leaves nothing in the queue; what was computed for it is known to the next."""
    work = work_of(tiny, "embed")
    async with Runs(batch_rows=8) as runs:
        chunks = runs.runs.run(work, CELLS, Timing())
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]
        assert runs.batcher._n_queued == 0
        _, n_hits = await runs.ask(work, CELLS)
        assert n_hits >= 8
