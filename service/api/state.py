"""What endpoints share: built once in app.py, handed down through the application's state."""

import math
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import scipy.sparse as sp
from starlette.requests import Request

from service.api.client_budget import ClientBudgets
from service.api.limits import Intake
from service.api.oip_statistics import Statistics
from service.api.progress import Progress
from service.api.uploads import Uploads
from service.cells.columns import Columns
from service.inference.batcher import Batcher
from service.inference.cached import CachedRuns
from service.inference.here import Here
from service.inference.models import Models
from service.inference.shadow import Shadows
from service.inference.work import Timing, Work

if TYPE_CHECKING:
    from service.trace_export import Traces


@dataclass
class State:
    """The parts of a running service."""

    models: Models
    batcher: Batcher
    shadows: Shadows
    intake: Intake
    uploads: Uploads
    parsers: ThreadPoolExecutor
    """Threads that read bodies and align genes; their number bounds the memory that parsing takes."""

    questions: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="cellserve-questions"), kw_only=True
    )
    """The thread that answers questions about whole requests: one at a time, so that they take neither the parsers' time nor much memory."""

    max_cells: int
    max_decoded_bytes: int
    timeout_seconds: float
    stall_seconds: float = 60.0
    """A chunk that runs longer than this is not going to end."""

    here: Here = field(default_factory=Here)
    cached: CachedRuns | None = None
    budgets: ClientBudgets | None = None
    progress: Progress = field(default_factory=Progress)
    traces: "Traces | None" = None
    """None where requests are not traced."""

    admin_token: str | None = None
    is_draining: bool = False
    statistics: Statistics = field(default_factory=Statistics)
    """Of the requests of the Open Inference Protocol."""
    n_in_flight: int = 0
    """Requests being answered, other than probes."""

    def run(
        self, work: Work, counts: sp.csr_matrix, timing: Timing, deadline: float = math.inf
    ) -> AsyncGenerator[Columns]:
        """As `Batcher.run`, at the cost of the client whose request this is, and from the cache where there is one."""
        return (self.cached or self.batcher).run(work, counts, timing, deadline, self._charge())

    async def at_once(
        self, work: Work, counts: sp.csr_matrix, timing: Timing, deadline: float = math.inf
    ) -> Columns | None:
        """As `Batcher.at_once`; None where there is a cache, too, which may know some of the cells."""
        if self.cached is not None:
            return None
        return await self.batcher.at_once(work, counts, timing, deadline, self._charge())

    def _charge(self) -> Callable[[float], None] | None:
        return self.budgets.charge_to_current() if self.budgets is not None else None


def state(request: Request) -> State:
    """The state of the application that serves the request."""
    return cast("State", request.app.state.cellserve)
