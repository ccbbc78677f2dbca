"""Runs together what arrives together: requests of one model, task and options share chunks of a bounded number of rows.

Greedy: as soon as the runtime is free, what waits is taken, so an idle server adds no wait. Requests take turns: one that does not fit
into a chunk goes to the back of its queue with what is left of it; lanes.py says who is next.
"""

import asyncio
import contextlib
import math
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import scipy.sparse as sp

from service import metrics, tracing
from service.cells.columns import Columns, concatenate, n_cells, take
from service.cells.counts import some_rows, stacked
from service.errors import DeadlinePassed, DeadlineTooShort, QueueFull, ShuttingDown
from service.inference.here import CHUNK_SECONDS, Here, after_answers, others_turn
from service.inference.lanes import SHORT_ROWS, Lanes
from service.inference.work import Chunk, Piece, Ticket, Timing, Work

MAX_WAITING_CHUNKS = 4
"""Chunks of an answer that may wait for a slow client before the request gives up its turn: the bound on an answer's memory."""

CHUNK_ROWS = 256
"""A chunk may always have so many rows, however slow the model is."""

HEADROOM = 1.75
"""An answer is expected so many times later than its rows alone would take: it must be written and sent as well, and others may go before.
With 1.5 one answer in a hundred came too late under ten times the load (`make bench-overload`)."""

LOOKS = 16
"""Of so many short requests two look whether others have come with them."""

N_REMEMBERED = 8
"""The next long request is taken to have as many cells as the smallest of so many that came last."""


@dataclass
class Runs:
    """Runs of one model at one number of rows."""

    n_runs: int = 0
    seconds: float = 0.0


class Batcher:
    """The queue and the one thread that runs graphs. Belongs to one event loop; every method is called from it."""

    def __init__(self, *, batch_rows: int, max_queue_rows: int, here: Here | None = None) -> None:
        """Make an idle batcher; `start` runs it.

        Args:
            batch_rows: rows that run together at most; where they are more than CHUNK_ROWS, as many as run in CHUNK_SECONDS.
            max_queue_rows: rows that may wait. Beyond it requests are refused.
            here: what runs in the event loop.
        """
        self._here = here or Here()
        self._batch_rows = batch_rows
        self._max_queue_rows = max_queue_rows
        self._lanes: Lanes[Ticket] = Lanes()
        self._tickets: set[Ticket] = set()
        self._n_queued = 0
        self._wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cellserve-compute")
        self._task: asyncio.Task[None] | None = None
        self._rows_per_second = 0.0
        self._speed: dict[tuple[str, str], float] = {}
        """Rows a second of a model and task, in runs of many."""
        self._long_rows: deque[int] = deque(maxlen=N_REMEMBERED)
        """Rows of the long requests that came last, whether they were taken or refused."""
        self._n_coming = 0
        """Long requests that are being parsed."""
        self._n_alone = 0
        """Short requests in a row that were alone, as far as was looked."""
        self._n_at_once = 0
        """Short requests that wait for the end of this turn of the loop, to run at once if there is no other."""
        self._quick: set[tuple[str, str, int]] = set()
        """Models, tasks and numbers of rows, padded, that were quick the last time."""
        self._is_stopping = False
        self.runs: defaultdict[str, defaultdict[int, Runs]] = defaultdict(lambda: defaultdict(Runs))
        """By model and number of rows."""
        self._running_since: float | None = None

    def start(self) -> None:
        """Begin to take work."""
        self._task = asyncio.create_task(self._run(), name="cellserve-batcher")

    async def stop(self) -> None:
        """Refuse what waits and end. What runs at this moment completes."""
        self._is_stopping = True
        for ticket in self._tickets:
            ticket.deliver(ShuttingDown())
        self._lanes.clear()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._executor.shutdown(wait=True)

    async def run(
        self,
        work: Work,
        counts: sp.csr_matrix,
        timing: Timing | None = None,
        deadline: float = math.inf,
        charge: Callable[[float], None] | None = None,
    ) -> AsyncGenerator[Columns]:
        """Queue cells and give their answer chunk by chunk, in order. Leaving the iteration takes the rest out of the queue.

        Args:
            work: model, task and options.
            counts: aligned to the model's genes, at least one row.
            timing: filled with where the time went.
            deadline: on the clock of `time.monotonic`; work that cannot be done by then is not begun.
            charge: told the seconds of computing that these cells cost: of each chunk their share by rows.

        Raises:
            QueueFull: more rows would wait than are allowed. Nothing was queued.
            DeadlineTooShort: at the speed that was measured the answer would come too late. Nothing was queued.
            DeadlinePassed: it waited until its deadline, and was dropped before it ran.
            ShuttingDown: the batcher stops.
        """
        n_rows = int(counts.shape[0])
        if n_rows > SHORT_ROWS:
            self._long_rows.append(n_rows)
        if self._is_stopping:
            raise ShuttingDown
        self.check_room(deadline, n_rows)
        ticket = Ticket(work, counts, time.monotonic(), deadline, charge=charge, trace=tracing.current.get())
        self._change_queue(n_rows)
        self._tickets.add(ticket)
        self._enqueue(ticket)
        n_given = 0
        try:
            while n_given < n_rows:
                if not ticket.results:
                    ticket.has_result.clear()
                    await ticket.has_result.wait()
                result = ticket.results.popleft()
                if ticket.n_left and not ticket.is_waiting:
                    self._enqueue(ticket)
                if isinstance(result, BaseException):
                    raise result
                n_given += n_cells(result)
                if timing is not None:
                    timing.queue_seconds, timing.compute_seconds = ticket.wait_seconds, ticket.compute_seconds
                yield result
        finally:
            self._tickets.discard(ticket)
            self._change_queue(-ticket.n_left)
            ticket.n_taken = n_rows
            ticket.record()

    async def at_once(
        self,
        work: Work,
        counts: sp.csr_matrix,
        timing: Timing,
        deadline: float = math.inf,
        charge: Callable[[float], None] | None = None,
    ) -> Columns | None:
        """The answer for a few cells that nobody else is beside of: the queue's task would be woken up for them, and wake theirs in turn.

        Args:
            work: model, task and options.
            counts: as of `run`, and so are the others.
            timing: filled with where the time went.
            deadline: on the clock of `time.monotonic`.
            charge: told the seconds of computing.

        Returns:
            None where they have to be queued, since they are many, or slow, or others wait, run, or came in the same turn of the loop.

        Raises:
            ShuttingDown, DeadlinePassed: as of `run`.
        """
        n_rows = int(counts.shape[0])
        ticket = Ticket(work, counts, time.monotonic(), deadline, charge=charge, trace=tracing.current.get())
        chunk = self._chunk([(ticket, 0, n_rows)], "idle")
        if not (ticket.is_short and self._is_here(chunk)):
            return None
        if self._lanes or self._running_since is not None or not await self._is_alone():
            return None
        if self._is_stopping:
            raise ShuttingDown
        self._begin(ticket)
        ticket.n_taken = n_rows
        began = chunk.started = time.monotonic()
        try:
            columns = _compute(chunk.pieces)
        except Exception as error:
            self._failed(chunk, error)
            raise
        self._done(chunk, columns, began)
        timing.queue_seconds, timing.compute_seconds = ticket.wait_seconds, ticket.compute_seconds
        ticket.record()
        return columns

    async def _is_alone(self) -> bool:
        """Whether no other short request has come in the same turn of the loop, which would run together with this one.

        It takes the rest of the turn to know. So after some that had no company only two of `LOOKS` look: two in a
        row, since the last of those that come together finds the others gone.
        """
        if self._n_alone >= LOOKS and self._n_alone % LOOKS > 1:
            self._n_alone += 1
            return True
        self._n_at_once += 1
        try:
            await asyncio.sleep(0)
            is_alone = self._n_at_once == 1 and not self._lanes and self._running_since is None
        finally:
            self._n_at_once -= 1
        self._n_alone = self._n_alone + 1 if is_alone else 0
        return is_alone

    @property
    def is_running(self) -> bool:
        """Whether the queue is being worked off."""
        return self._task is not None and not self._task.done()

    @property
    def is_dead(self) -> bool:
        """Whether it was started and has ended without being asked to."""
        return self._task is not None and self._task.done() and not self._is_stopping

    @property
    def running_seconds(self) -> float:
        """How long the chunk that runs at this moment has been running; 0 between chunks."""
        return time.monotonic() - self._running_since if self._running_since is not None else 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._n_queued and self._running_since is None

    def retry_after_seconds(self) -> int:
        """Seconds after which what waits now should have run, at the speed that was measured; at least 1, at most 60."""
        return min(60, max(1, math.ceil(self._n_queued / self._rows_per_second))) if self._rows_per_second else 1

    def check_room(self, deadline: float = math.inf, n_rows: int | None = None) -> None:
        """Refuse what cannot be taken, or not be done in time.

        Args:
            deadline: on the clock of `time.monotonic`.
            n_rows: of the request. By default it is a long one that has not been read, and would be read in vain: it is taken to be like
                those that came last.

        Raises:
            QueueFull: more rows would wait than are allowed.
            DeadlineTooShort: at the speed that was measured the answer would come too late.
        """
        if self._n_queued + (n_rows or 1) > self._max_queue_rows:
            raise QueueFull(
                n_queued=self._n_queued,
                n_cells=n_rows or 1,
                limit_rows=self._max_queue_rows,
                retry_after_seconds=self.retry_after_seconds(),
            )
        left = deadline - time.monotonic()
        if (expected := self._expected_seconds(n_rows or self._usual_rows)) > left:
            raise DeadlineTooShort(
                expected_seconds=expected,
                left_seconds=max(0.0, left),
                retry_after_seconds=self.retry_after_seconds(),
            )

    @contextlib.contextmanager
    def coming(self, deadline: float = math.inf) -> Iterator[None]:
        """Keep room for a long request while it is parsed, so that no others are parsed for the same room, and in vain.

        Raises:
            QueueFull, DeadlineTooShort: as of `check_room`.
        """
        self.check_room(deadline)
        self._n_coming += 1
        try:
            yield
        finally:
            self._n_coming -= 1

    @property
    def _usual_rows(self) -> int:
        """What a long request is taken to have before it is known."""
        return min(self._long_rows, default=SHORT_ROWS + 1)

    def _expected_seconds(self, n_rows: int) -> float:
        """Until `n_rows` more would be done. A short request waits for others of its kind only, so it counts for itself.

        Nothing where nothing waits: an estimate that is too high would refuse all, and could never be found wrong.
        """
        if not self._rows_per_second or self.is_idle:
            return 0.0
        n_before = 0 if n_rows <= SHORT_ROWS else self._n_queued + self._n_coming * self._usual_rows
        return HEADROOM * (n_before + n_rows) / self._rows_per_second

    def _enqueue(self, ticket: Ticket) -> None:
        ticket.is_waiting = True
        self._lanes.add(ticket.work.key, ticket)
        self._wake.set()

    def _change_queue(self, n_rows: int) -> None:
        self._n_queued += n_rows
        metrics.QUEUE_ROWS.inc(n_rows)

    async def _run(self) -> None:
        free_since, was_idle, is_here = time.monotonic(), True, False
        while True:
            if is_here and self._lanes:
                await others_turn()
            pieces = self._next_pieces()
            if pieces:
                is_here = await self._run_chunk(self._chunk(pieces, "idle" if was_idle else "free"), free_since)
            else:
                is_here = False
                self._wake.clear()
                await self._wake.wait()
            was_idle, free_since = not pieces, time.monotonic()

    async def _run_chunk(self, chunk: Chunk, free_since: float) -> bool:
        """Run what the queue gave, and answer it; whether that was in the event loop.

        Nothing of a chunk stays with the task of the queue, which may not run for long: its model may be unloaded meanwhile.
        """
        is_here = self._is_here(chunk)
        chunk.started = self._running_since = time.monotonic()
        try:
            if is_here:
                columns = _compute(chunk.pieces)
            else:
                columns = await asyncio.get_running_loop().run_in_executor(self._executor, _compute, chunk.pieces)
        except Exception as error:
            self._failed(chunk, error)
            return False
        finally:
            self._running_since = None
        self._done(chunk, columns, free_since)
        return is_here

    def _chunk(self, pieces: list[Piece], reason: str) -> Chunk:
        """A chunk of these pieces, which is run for that reason if it is not full."""
        n_rows = sum(stop - start for _, start, stop in pieces)
        limit = self._limit(pieces[0][0])
        work = pieces[0][0].work
        # More rows than CHUNK_ROWS are together only where they are quick (`_limit`).
        kind = (*work.key[:2], work.n_run(min(n_rows, CHUNK_ROWS)))
        return Chunk(pieces, work, n_rows, limit, kind, "full" if n_rows >= limit else reason)

    def _is_here(self, chunk: Chunk) -> bool:
        """Whether a chunk runs in the event loop."""
        return chunk.n_rows <= self._here.rows and chunk.kind in self._quick

    def _failed(self, chunk: Chunk, error: Exception) -> None:
        """Tell a chunk's requests that it did not run."""
        chunk.trace(type(error).__name__)
        for ticket, _, _ in chunk.pieces:
            # It will not run again: the request ends with this error, and its rows leave the queue with it.
            ticket.deliver(error)

    def _done(self, chunk: Chunk, columns: Columns, free_since: float) -> None:
        """Give a chunk's requests what they asked for, and learn how fast it was; the runtime had been free since then."""
        seconds, n_rows, work = time.monotonic() - chunk.started, chunk.n_rows, chunk.work
        if n_rows <= min(self._here.rows, CHUNK_ROWS):
            (self._quick.add if seconds < self._here.seconds else self._quick.discard)(chunk.kind)
        # From chunk to chunk, not that of the run alone: what else this process does takes its time from the queue as well. Of chunks
        # with many rows: a single cell's takes nearly as long as theirs, and says nothing of how fast they would be.
        if n_rows >= min(chunk.limit, CHUNK_ROWS) // 2:
            rate = n_rows / (time.monotonic() - free_since)
            self._rows_per_second = 0.8 * (self._rows_per_second or rate) + 0.2 * rate
            speed = n_rows / max(seconds, 1e-6)
            self._speed[work.key[:2]] = 0.8 * self._speed.get(work.key[:2], speed) + 0.2 * speed
        after_answers(self._measure, chunk, seconds)
        batch = chunk.trace()
        position = 0
        for ticket, start, stop in chunk.pieces:
            ticket.compute_seconds += seconds
            if ticket.charge is not None:
                ticket.charge(seconds * (stop - start) / n_rows)
            ticket.ended, ticket.n_chunks = chunk.started + seconds, ticket.n_chunks + 1
            if batch is not None and ticket.trace is not None:
                ticket.batches.append(batch)
            ticket.deliver(take(columns, position, position + stop - start))
            position += stop - start

    def _measure(self, chunk: Chunk, seconds: float) -> None:
        """Count a chunk."""
        runs = self.runs[chunk.work.model.id][chunk.n_rows]
        runs.n_runs, runs.seconds = runs.n_runs + 1, runs.seconds + seconds
        task = chunk.work.task.name
        metrics.series(metrics.BATCHES, task, chunk.reason).inc()
        metrics.series(metrics.BATCH_ROWS, task).observe(chunk.n_rows)
        metrics.series(metrics.BATCH_FILL, task).observe(chunk.n_rows / chunk.limit)
        metrics.series(metrics.BATCH_PADDING, task).observe(1 - chunk.n_rows / chunk.work.n_run(chunk.n_rows))
        metrics.series(metrics.BATCH_SECONDS, task).observe(seconds)

    def _limit(self, first: Ticket) -> int:
        """Rows that may run in a chunk that begins with a ticket: whole CHUNK_ROWS, which fill the threads of a graph.

        No more than CHUNK_ROWS behind a short request, which has its answer when all have run.
        """
        quick = 1 if first.is_short else int(self._speed.get(first.work.key[:2], 0.0) * CHUNK_SECONDS) // CHUNK_ROWS
        return min(self._batch_rows, max(1, quick) * CHUNK_ROWS)

    def _next_pieces(self) -> list[Piece]:
        """The next chunk's, all of one work. Empty when nothing waits."""
        pieces: list[Piece] = []
        while not pieces and (taken := self._lanes.take(self._limit)):
            for ticket, n_rows in taken:
                if not self._take(ticket, n_rows):
                    continue
                pieces.append((ticket, ticket.n_taken - n_rows, ticket.n_taken))
                # A ticket whose client does not read waits outside; `run` brings it back.
                if ticket.n_left and len(ticket.results) + 1 < MAX_WAITING_CHUNKS:
                    self._enqueue(ticket)
        return pieces

    def _take(self, ticket: Ticket, n_rows: int) -> bool:
        """Take rows of a request out of the queue, to be run; false where it has waited for too long and is told so."""
        ticket.is_waiting = False
        if not ticket.n_taken:
            try:
                self._begin(ticket)
            except DeadlinePassed as error:
                ticket.deliver(error)
                return False
        ticket.n_taken += n_rows
        self._change_queue(-n_rows)
        return True

    def _begin(self, ticket: Ticket) -> None:
        """Note how long a request has waited whose first rows are about to run.

        Raises:
            DeadlinePassed: too long.
        """
        now = time.monotonic()
        if now > ticket.deadline:
            raise DeadlinePassed(waited_seconds=now - ticket.admitted)
        ticket.wait_seconds = now - ticket.admitted
        lane = "short" if ticket.is_short else "long"
        after_answers(metrics.series(metrics.QUEUE_WAIT_SECONDS, lane).observe, ticket.wait_seconds)


def _compute(pieces: list[Piece]) -> Columns:
    """Run one chunk; in the compute thread."""
    work = pieces[0][0].work
    counts = stacked([some_rows(ticket.counts, start, stop) for ticket, start, stop in pieces])
    return work.task.run(work.model, counts, work.options)


async def run_whole(batcher: Batcher, work: Work, counts: sp.csr_matrix) -> Columns:
    """The answer in one piece."""
    return concatenate([columns async for columns in batcher.run(work, counts)])
