"""What the batcher works on: requests that wait, what they have in common, and chunks of them that run together."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import scipy.sparse as sp
from opentelemetry.trace import SpanContext

from service import tracing
from service.cells.columns import Columns
from service.inference.lanes import SHORT_ROWS
from service.inference.model import Model
from service.inference.task import Options, Task


@dataclass(frozen=True)
class Work:
    """What requests must have in common to run together."""

    model: Model
    task: Task
    options: Options

    @property
    def key(self) -> tuple[str, str, Options, int]:
        """Equal for what may run together. A version that was unloaded and loaded again is another object of the same name."""
        return self.model.id, self.task.name, self.options, id(self.model)

    @property
    def attributes(self) -> dict[str, str | int | float]:
        """What spans say of it."""
        manifest = self.model.manifest
        return {
            "cellserve.model": manifest.name,
            "cellserve.version": manifest.version,
            "cellserve.task": self.task.name,
        }

    def n_run(self, n_rows: int) -> int:
        """Rows that the first graph of the task runs with for so many cells: what it is padded to."""
        sessions = [self.model.sessions[graph] for graph in self.task.graphs if graph in self.model.sessions]
        return sessions[0].n_run(n_rows) if sessions else n_rows


@dataclass(eq=False)
class Ticket:
    """One request in the queue."""

    work: Work
    counts: sp.csr_matrix
    admitted: float
    deadline: float = math.inf
    """On the clock of `time.monotonic`; what has not begun by then is dropped."""

    n_taken: int = 0
    """Rows that have been given to the runtime."""

    is_waiting: bool = False
    """False while all of it has been taken, and while it is paused because its client does not read."""

    results: deque[Columns | BaseException] = field(default_factory=deque)
    has_result: asyncio.Event = field(default_factory=asyncio.Event)
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    charge: Callable[[float], None] | None = None
    """Told the seconds that its own rows have cost, chunk by chunk, also where its client has left meanwhile."""
    ended: float = 0.0
    """When the last of its chunks had run."""

    n_chunks: int = 0
    trace: tracing.RequestTrace | None = None
    batches: list[SpanContext] = field(default_factory=list)
    """Spans of the chunks that it was part of, where it is traced."""

    def deliver(self, result: Columns | BaseException) -> None:
        """Give it the next chunk of its answer, or the error that ends it."""
        self.results.append(result)
        self.has_result.set()

    def record(self) -> None:
        """Say to its trace, where it has one, where it waited and ran."""
        if self.trace is None:
            return
        rows: dict[str, str | int | float] = {"cellserve.rows": int(self.counts.shape[0])}
        if not self.n_chunks:
            self.trace.stage("queue", self.admitted, time.monotonic(), rows)
            return
        began = self.admitted + self.wait_seconds
        self.trace.stage("queue", self.admitted, began, rows)
        attributes = {
            **self.work.attributes,
            **rows,
            "cellserve.chunks": self.n_chunks,
            "cellserve.busy_seconds": self.compute_seconds,
        }
        self.trace.stage("compute", began, self.ended, attributes, self.batches)

    @property
    def n_left(self) -> int:
        """Rows that still have to run."""
        return int(self.counts.shape[0]) - self.n_taken

    @property
    def is_short(self) -> bool:
        """Whether it goes before long requests."""
        return int(self.counts.shape[0]) <= SHORT_ROWS

    @property
    def has_begun(self) -> bool:
        """Whether some of its rows have been given to the runtime."""
        return self.n_taken > 0


Piece = tuple[Ticket, int, int]
"""A request, and the first of its rows that run together with others, and the last of them + 1."""


@dataclass(eq=False)
class Chunk:
    """What runs together."""

    pieces: list[Piece]
    work: Work
    n_rows: int
    limit: int
    """Rows that it might have had."""

    kind: tuple[str, str, int]
    """Model, task and number of rows, padded."""

    reason: str
    """Why it was not waited for more: one of metrics.REASONS."""

    started: float = 0.0

    def trace(self, error: str = "") -> SpanContext | None:
        """Record it for those of its requests that are traced; `error` is what it failed with."""
        requests = [ticket.trace for ticket, _, _ in self.pieces if ticket.trace is not None]
        if not requests:
            return None
        attributes = {
            **self.work.attributes,
            "cellserve.requests": len(self.pieces),
            "cellserve.rows": self.n_rows,
            "cellserve.fill": self.n_rows / self.limit,
            "cellserve.padding_rows": self.work.n_run(self.n_rows) - self.n_rows,
            "cellserve.reason": self.reason,
        }
        name = f"batch {self.work.task.name}"
        return tracing.record_batch(requests, name, self.started, time.monotonic(), attributes, error)


@dataclass
class Timing:
    """Where a request's time went; filled while its answer is made."""

    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    n_hits: int | None = None
    """Cells that the answer cache knew; None where there is no cache."""
