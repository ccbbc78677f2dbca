"""The batcher: what runs together, what waits, what is refused, and what a cancelled request leaves behind."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from service import metrics
from service.cells.columns import Columns, Values
from service.errors import DeadlinePassed, DeadlineTooShort, QueueFull, ShuttingDown
from service.inference import TASKS
from service.inference import batcher as module
from service.inference.batcher import HEADROOM, Batcher, run_whole
from service.inference.here import Here
from service.inference.model import Model
from service.inference.task import Options, Task
from service.inference.work import Timing, Work
from tests.builders import counts


@dataclass
class RecordingTask:
    """Answers each cell with its first gene, and notes what ran together; may be held or made to fail."""

    chunks: list[list[float]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    poison: float | None = None
    seconds_per_row: float = 0.0

    def __post_init__(self) -> None:
        self.gate.set()

    def run(self, model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
        self.gate.wait(10)
        first = counts[:, 0].toarray().ravel().astype(np.float32)
        self.chunks.append(first.tolist())
        time.sleep(self.seconds_per_row * len(first))
        if self.poison is not None and self.poison in first:
            raise RuntimeError("poisoned")
        return {"first": Values(first)}

    def task(self, name: str = "record") -> Task:
        return Task(name=name, summary="", description="", graphs=(), run=self.run)


class NumberedOptions(Options):
    """Options that tell requests apart."""

    number: int = 0


@pytest.fixture
def recording() -> RecordingTask:
    return RecordingTask()


@pytest.fixture
async def started() -> AsyncIterator[Callable[..., Batcher]]:
    """Make and start batchers; stopped with the test."""
    batchers = []

    def start(batch_rows: int = 256, max_queue_rows: int = 100_000, here: Here | None = None) -> Batcher:
        batchers.append(Batcher(batch_rows=batch_rows, max_queue_rows=max_queue_rows, here=here))
        batchers[-1].start()
        return batchers[-1]

    yield start
    for batcher in batchers:
        await batcher.stop()


def rows(*values: float) -> sp.csr_matrix:
    """One cell per value, which is the count of its first gene."""
    return sp.csr_matrix(np.array([[value, 1] for value in values], dtype=np.float32))


async def answered(batcher: Batcher, work: Work, counts: sp.csr_matrix) -> list[float]:
    columns = await run_whole(batcher, work, counts)
    return columns["first"].values.tolist()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("seconds_per_row", "largest"), [(0, 1024), (1 / 20_000, 256)])
async def test_a_chunk_has_as_many_rows_as_run_in_time(
    started, recording: RecordingTask, tiny: Model, seconds_per_row: float, largest: int
) -> None:
    """The first has 256 rows, and so has each of a slow task; of a quick one they grow to `batch_rows`."""
    batcher, work = started(batch_rows=1024), Work(tiny, recording.task(), Options())
    recording.seconds_per_row = seconds_per_row
    for _ in range(3):
        assert await answered(batcher, work, rows(*range(2048))) == list(range(2048))

    sizes = [len(chunk) for chunk in recording.chunks]
    assert sizes[0] == 256
    assert max(sizes) == largest
    assert {size % 256 for size in sizes} == {0}


async def test_a_short_request_waits_for_few_rows(started, recording: RecordingTask, tiny: Model) -> None:
    """However many rows a chunk may have: one that begins with a short request has 256, for it has its answer when all have run."""
    batcher, work = started(batch_rows=1024), Work(tiny, recording.task(), Options())
    await answered(batcher, work, rows(*range(4096)))
    recording.gate.clear()
    held = asyncio.create_task(answered(batcher, work, rows(-2)))
    await until(lambda: batcher._n_queued == 0 and bool(batcher._tickets))
    long = asyncio.create_task(answered(batcher, work, rows(*range(2048))))
    short = asyncio.create_task(answered(batcher, work, rows(-1)))
    await until(lambda: batcher._n_queued == 2049)
    recording.gate.set()
    await asyncio.gather(held, long, short)

    (at,) = (number for number, chunk in enumerate(recording.chunks) if chunk[0] == -1)
    assert len(recording.chunks[at]) == 256
    assert max(map(len, recording.chunks[at + 1 :])) == 1024


async def test_what_waits_runs_together(started, recording: RecordingTask, tiny: Model) -> None:
    """While one chunk runs, what arrives is taken as one; an idle batcher runs a request at once."""
    batcher, work = started(), Work(tiny, recording.task(), Options())
    recording.gate.clear()
    first = asyncio.create_task(answered(batcher, work, rows(1)))
    await until(lambda: batcher._n_queued == 0 and bool(batcher._tickets))
    others = [asyncio.create_task(answered(batcher, work, rows(value, value))) for value in (2, 3, 4)]
    await until(lambda: batcher._n_queued == 6)
    recording.gate.set()

    assert await first == [1]
    assert await asyncio.gather(*others) == [[2, 2], [3, 3], [4, 4]]
    assert recording.chunks == [[1], [2, 2, 3, 3, 4, 4]]


async def test_large_requests_are_split_and_small_ones_get_their_turn(
    started, recording: RecordingTask, tiny: Model
) -> None:
    """A request is cut into chunks of `batch_rows`; one that arrives behind it waits for one chunk, not for all."""
    batcher, work = started(batch_rows=64), Work(tiny, recording.task(), Options())
    recording.gate.clear()
    large = asyncio.create_task(answered(batcher, work, rows(*range(1000))))
    await until(lambda: batcher._n_queued == 1000 - 64)
    small = asyncio.create_task(answered(batcher, work, rows(-1)))
    await until(lambda: batcher._n_queued == 1000 - 64 + 1)
    recording.gate.set()

    assert await small == [-1]
    assert await large == [float(value) for value in range(1000)]
    assert max(len(chunk) for chunk in recording.chunks) == 64
    assert next(number for number, chunk in enumerate(recording.chunks) if -1 in chunk) <= 2


async def test_a_full_queue_refuses(started, recording: RecordingTask, tiny: Model) -> None:
    """Beyond `max_queue_rows` a request is refused with the numbers and when to come back; nothing of it is queued."""
    batcher, work = started(batch_rows=1, max_queue_rows=10), Work(tiny, recording.task(), Options())
    recording.gate.clear()
    waiting = asyncio.create_task(answered(batcher, work, rows(*range(9))))
    await until(lambda: batcher._n_queued == 8)
    with pytest.raises(QueueFull) as refused:
        await answered(batcher, work, rows(1, 2, 3))

    assert (refused.value.n_queued, refused.value.n_cells, refused.value.limit_rows) == (8, 3, 10)
    assert refused.value.retry_after_seconds >= 1
    assert batcher._n_queued == 8
    recording.gate.set()
    assert len(await waiting) == 9


async def test_a_cancelled_request_leaves_the_queue(started, recording: RecordingTask, tiny: Model) -> None:
    """Its rows are released and never run; requests behind it are answered."""
    batcher, work = started(batch_rows=2), Work(tiny, recording.task(), Options())
    recording.gate.clear()
    running = asyncio.create_task(answered(batcher, work, rows(1, 1)))
    await until(lambda: batcher._n_queued == 0 and bool(batcher._tickets))
    leaving = asyncio.create_task(answered(batcher, work, rows(7, 7, 7)))
    behind = asyncio.create_task(answered(batcher, work, rows(2)))
    await until(lambda: batcher._n_queued == 4)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving

    assert batcher._n_queued == 1
    recording.gate.set()
    assert await running == [1, 1]
    assert await behind == [2]
    assert not any(7 in chunk for chunk in recording.chunks)


async def test_an_error_reaches_its_requests_only(started, recording: RecordingTask, tiny: Model) -> None:
    """Requests of a chunk that fails get the error; later ones are answered and the queue is empty."""
    batcher, work = started(batch_rows=4), Work(tiny, recording.task(), Options())
    recording.poison = 13
    with pytest.raises(RuntimeError, match="poisoned"):
        await answered(batcher, work, rows(1, 13, 2, 3, 4, 5, 6, 7))

    assert await answered(batcher, work, rows(1, 2)) == [1, 2]
    assert batcher._n_queued == 0


async def test_lanes_do_not_mix(started, tiny: Model) -> None:
    """Another task, model or option never runs in the same chunk."""
    one, two = RecordingTask(), RecordingTask()
    batcher = started()
    other_model = replace(tiny, manifest=tiny.manifest.model_copy(update={"version": "9"}))
    works = [
        Work(tiny, one.task(), NumberedOptions(number=1)),
        Work(tiny, one.task(), NumberedOptions(number=2)),
        Work(other_model, one.task(), NumberedOptions(number=1)),
        Work(tiny, two.task("other"), NumberedOptions(number=1)),
    ]
    one.gate.clear()
    two.gate.clear()
    first = asyncio.create_task(answered(batcher, works[0], rows(0)))
    await until(lambda: batcher._n_queued == 0 and bool(batcher._tickets))
    tasks = [
        asyncio.create_task(answered(batcher, work, rows(number, number)))
        for number, work in enumerate(works, 1)
        for _ in (1, 2)
    ]
    await until(lambda: batcher._n_queued == 16)
    one.gate.set()
    two.gate.set()
    await asyncio.gather(first, *tasks)

    assert sorted(one.chunks) == [[0], [1] * 4, [2] * 4, [3] * 4]
    assert two.chunks == [[4] * 4]


async def test_a_client_that_does_not_read(started, recording: RecordingTask, tiny: Model) -> None:
    """Its answer stops growing after a few chunks, others go on, and when it reads again it gets the rest in order."""
    batcher, work = started(batch_rows=1), Work(tiny, recording.task(), Options())
    answer = batcher.run(work, rows(*range(50)))
    received = [(await anext(answer))["first"].values.tolist()]
    await until(lambda: len(recording.chunks) >= module.MAX_WAITING_CHUNKS)
    assert await answered(batcher, work, rows(99)) == [99]
    assert len(recording.chunks) <= module.MAX_WAITING_CHUNKS + 3

    received += [columns["first"].values.tolist() async for columns in answer]
    assert received == [[float(value)] for value in range(50)]


async def test_stop(started, recording: RecordingTask, tiny: Model) -> None:
    """Stopping ends what waits with an error, lets the running chunk complete, and takes nothing new."""
    batcher, work = started(batch_rows=1), Work(tiny, recording.task(), Options())
    recording.gate.clear()
    waiting = asyncio.create_task(answered(batcher, work, rows(1, 2, 3)))
    await until(lambda: batcher._n_queued == 2)
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    recording.gate.set()
    await stopping

    with pytest.raises(ShuttingDown):
        await waiting
    with pytest.raises(ShuttingDown):
        await answered(batcher, work, rows(1))


async def test_timing(started, recording: RecordingTask, tiny: Model) -> None:
    """A request learns how long it waited and ran."""
    timing = Timing()
    batcher, work = started(), Work(tiny, recording.task(), Options())
    recording.gate.clear()
    task = asyncio.create_task(anext(batcher.run(work, rows(1), timing)))
    await asyncio.sleep(0.02)
    recording.gate.set()
    await task

    assert timing.compute_seconds > 0.01
    assert 0 <= timing.queue_seconds < timing.compute_seconds


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), batch_rows=st.integers(1, 50))
def test_every_request_gets_its_own_cells_in_order(tiny: Model, sizes: list[int], batch_rows: int) -> None:
    """Whatever the sizes and the chunk, each request gets exactly its cells, in order."""

    async def ask() -> list[list[float]]:
        batcher = Batcher(batch_rows=batch_rows, max_queue_rows=10_000)
        batcher.start()
        work = Work(tiny, RecordingTask().task(), Options())
        starts = np.cumsum([0, *sizes])
        answers = await asyncio.gather(
            *(
                answered(batcher, work, rows(*range(start, start + size)))
                for start, size in zip(starts, sizes, strict=False)
            )
        )
        await batcher.stop()
        return answers

    answers = asyncio.run(ask())
    assert [value for answer in answers for value in answer] == list(range(sum(sizes)))


async def test_a_deadline_that_cannot_be_met_is_refused_early(started, recording: RecordingTask, tiny: Model) -> None:
    """Once the speed is known, a request that would take longer than its client waits is not queued."""
    batcher = started()
    work = Work(tiny, recording.task(), Options())
    recording.gate.clear()
    first = asyncio.create_task(answered(batcher, work, rows(1, 2, 3)))
    await asyncio.sleep(0.05)
    batcher._rows_per_second = 100.0

    with pytest.raises(DeadlineTooShort) as refused:
        await anext(batcher.run(work, rows(*range(300)), deadline=time.monotonic() + 1))
    assert refused.value.expected_seconds == pytest.approx(3 * HEADROOM)
    assert batcher._n_queued == 0
    recording.gate.set()
    assert await first == [1, 2, 3]
    assert len(recording.chunks) == 1
    assert await answered(batcher, work, rows(*range(300))) == list(range(300))


async def test_what_is_like_the_last_ones_is_refused_unread(started, recording: RecordingTask, tiny: Model) -> None:
    """A long request that has not been read is taken to have as many rows as the smallest of those that came last."""
    batcher = started()
    work = Work(tiny, recording.task(), Options())
    recording.gate.clear()
    first = asyncio.create_task(answered(batcher, work, rows(1)))
    await asyncio.sleep(0.05)
    batcher._rows_per_second = 1000 * HEADROOM

    batcher.check_room(time.monotonic() + 0.1)
    with pytest.raises(DeadlineTooShort):
        await anext(batcher.run(work, rows(*range(200)), deadline=time.monotonic() + 0.1))
    with pytest.raises(DeadlineTooShort):
        batcher.check_room(time.monotonic() + 0.1)
    with pytest.raises(DeadlineTooShort):
        await anext(batcher.run(work, rows(*range(90)), deadline=time.monotonic() + 0.01))
    batcher.check_room(time.monotonic() + 0.1)
    recording.gate.set()
    assert await first == [1]


async def test_what_is_being_parsed_keeps_its_room(started, recording: RecordingTask, tiny: Model) -> None:
    """Two long requests are not parsed for the room of one."""
    batcher = started()
    work = Work(tiny, recording.task(), Options())
    recording.gate.clear()
    first = asyncio.create_task(answered(batcher, work, rows(1)))
    await asyncio.sleep(0.05)
    batcher._rows_per_second = 1000 * HEADROOM

    with batcher.coming(time.monotonic() + 0.1):
        with pytest.raises(DeadlineTooShort), batcher.coming(time.monotonic() + 0.1):
            pass
        batcher.check_room(time.monotonic() + 0.1, n_rows=1)
    with batcher.coming(time.monotonic() + 0.1):
        recording.gate.set()
        assert await first == [1]


async def test_a_wrong_estimate_mends_itself(started, recording: RecordingTask, tiny: Model) -> None:
    """Where nothing waits nothing is refused, or an estimate that refuses all would never be measured again."""
    batcher = started(batch_rows=16)
    work = Work(tiny, recording.task(), Options())
    batcher._rows_per_second = 0.001

    deadline = time.monotonic() + 5
    for _ in range(40):
        batches = [columns async for columns in batcher.run(work, rows(*range(16)), deadline=deadline)]
        assert len(batches) == 1
    assert batcher._rows_per_second > 1


async def test_single_cells_say_nothing_of_the_rate(started, recording: RecordingTask, tiny: Model) -> None:
    """A chunk of one cell takes nearly as long as a full one."""
    batcher = started(batch_rows=16)
    work = Work(tiny, recording.task(), Options())
    await answered(batcher, work, rows(1))
    assert batcher._rows_per_second == 0.0
    await answered(batcher, work, rows(*range(16)))
    measured = batcher._rows_per_second
    assert measured
    for _ in range(30):
        await answered(batcher, work, rows(1))
    assert batcher._rows_per_second == measured


async def test_what_has_expired_is_not_run(started, recording: RecordingTask, tiny: Model) -> None:
    """A request whose deadline passes while it waits is answered with that, and its cells never run."""
    batcher = started()
    work = Work(tiny, recording.task(), Options())
    recording.gate.clear()
    first = asyncio.create_task(answered(batcher, work, rows(1)))
    await asyncio.sleep(0.05)
    late = asyncio.create_task(anext(batcher.run(work, rows(2), deadline=time.monotonic() + 0.05)))
    await asyncio.sleep(0.1)
    recording.gate.set()

    assert await first == [1]
    with pytest.raises(DeadlinePassed):
        await late
    assert recording.chunks == [[1]]
    assert batcher._n_queued == 0


async def test_many_small_requests_leave_the_loop_its_turns(started, recording: RecordingTask, tiny: Model) -> None:
    """Few rows run in the event loop once they are known to be quick, and others of the loop are not kept waiting."""
    batcher = started(here=Here(seconds=60.0))  # however busy the machine is that runs this
    work = Work(tiny, recording.task(), Options())
    await answered(batcher, work, rows(1))
    assert batcher._quick == {(tiny.id, "record", 1)}
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    different = [replace(work, options=NumberedOptions(number=number)) for number in range(50)]
    await asyncio.gather(*(answered(batcher, one, rows(1)) for one in different))
    counting.cancel()
    assert turns >= 50


async def test_what_runs_in_the_event_loop(started, tiny: Model) -> None:
    """Chunks up to so many rows, when as many were quick the last time; other chunks run in the thread of the graphs."""
    ran: list[tuple[int, bool]] = []
    seconds = 0.0

    def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
        ran.append((counts.shape[0], threading.current_thread() is threading.main_thread()))
        time.sleep(seconds)
        return {"first": Values(counts[:, 0].toarray().ravel())}

    batcher = started(here=Here(rows=32, seconds=1.0))
    work = Work(tiny, Task(name="noting", summary="", description="", graphs=(), run=run), Options())
    for n in (1, 1, 30, 30, 33, 33):
        await answered(batcher, work, rows(*range(n)))
    assert ran == [(1, False), (1, True), (30, False), (30, True), (33, False), (33, False)]

    seconds = 1.1
    await answered(batcher, work, rows(*range(30)))
    seconds = 0.0
    await answered(batcher, work, rows(*range(30)))
    assert ran[-2:] == [(30, True), (30, False)]


async def test_why_a_chunk_began(started, recording: RecordingTask, tiny: Model) -> None:
    """Counted per chunk: nothing ran before it, it took all that waited, or it took as many as may run together; and how full it was."""
    name = "counted"
    batcher, work = started(batch_rows=4), Work(tiny, recording.task(name), Options())

    def counted() -> dict[str, float]:
        return {reason: metrics.BATCHES.labels(name, reason)._value.get() for reason in metrics.REASONS}

    recording.gate.clear()
    first = asyncio.create_task(answered(batcher, work, rows(1)))
    await until(lambda: batcher.running_seconds > 0)
    others = [asyncio.create_task(answered(batcher, work, rows(*range(n)))) for n in (3, 3)]
    await asyncio.sleep(0.01)
    recording.gate.set()
    await asyncio.gather(first, *others)

    assert counted() == {"idle": 1, "full": 1, "free": 1}
    assert metrics.BATCH_FILL.labels(name)._sum.get() == pytest.approx(1 / 4 + 4 / 4 + 2 / 4)
    assert metrics.BATCH_PADDING.labels(name)._sum.get() == 0  # this task runs no graph


@pytest.mark.parametrize(("n_rows", "padding"), [(3, 13), (16, 0), (17, 47), (70, 10), (128, 0)])
async def test_padding(started, tiny: Model, n_rows: int, padding: int) -> None:
    """The rows that fill a run up to a shape of fixed bits are said, as a share of all that ran."""
    batcher = started()
    task = replace(TASKS["embed"], name=f"embed_{n_rows}")
    await run_whole(batcher, Work(tiny, task, Options()), counts(n_rows))

    assert metrics.BATCH_PADDING.labels(task.name)._sum.get() == pytest.approx(padding / (n_rows + padding))
    assert metrics.BATCH_SECONDS.labels(task.name)._sum.get() > 0


async def test_a_long_request_is_refused_unread(started, recording: RecordingTask, tiny: Model) -> None:
    """Where what waits would take longer than the client does, or no row has room; not where nothing waits."""
    batcher = started(max_queue_rows=20)
    work = Work(tiny, recording.task(), Options())
    batcher.check_room(time.monotonic() + 0.001)
    recording.gate.clear()
    running = asyncio.create_task(answered(batcher, work, rows(1)))
    await asyncio.sleep(0.05)
    batcher._rows_per_second = 10.0

    batcher.check_room(time.monotonic() + 100)
    with pytest.raises(DeadlineTooShort):
        batcher.check_room(time.monotonic() + 1)
    waiting = asyncio.create_task(answered(batcher, work, rows(*range(20))))
    await asyncio.sleep(0.05)
    with pytest.raises(QueueFull):
        batcher.check_room()
    recording.gate.set()
    assert await running == [1]
    assert await waiting == list(range(20))
