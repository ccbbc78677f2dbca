"""What endpoints share: built once in app.py, handed down through the application's state."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from service.api.limits import Intake
from service.api.oip_statistics import Statistics
from service.inference.batcher import Batcher
from service.inference.models import Models
from service.inference.shadow import Shadows


@dataclass
class State:
    """The parts of a running service."""

    models: Models
    batcher: Batcher
    shadows: Shadows
    intake: Intake
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

    admin_token: str | None = None
    is_draining: bool = False
    statistics: Statistics = field(default_factory=Statistics)
    """Of the requests of the Open Inference Protocol."""
    n_in_flight: int = 0
    """Requests being answered, other than probes."""


def state(request: Request) -> State:
    """The state of the application that serves the request."""
    return cast("State", request.app.state.cellserve)
