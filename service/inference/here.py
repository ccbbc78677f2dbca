"""What runs in the event loop instead of the thread of the graphs, for how long, and how others of the loop have their turn."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVarTuple

CHUNK_SECONDS = 0.01
"""A chunk has as many rows as ran in this time before: what comes with each (answers written and sent, which takes longer between
runs than by itself) is paid less often, and nobody has to wait for long."""

IDLE_SECONDS = 5e-5
"""A turn of the event loop that takes less had nothing to do."""

QUICK_SECONDS = 0.002
"""A few rows of a task that took less than this the last time run in the event loop: two changes of threads would take longer."""


Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True)
class Here:
    """What is done in the event loop instead of a thread: others wait for that long, and two changes of threads are saved."""

    rows: int = 16
    """Cells that run in it,"""

    seconds: float = QUICK_SECONDS
    """if so many took less the last time."""

    arrow_bytes: int = 0
    """Longest Arrow body that is parsed in it, if it is not compressed."""


def choose_here(n_cpus: int) -> Here:
    """Whole chunks, too, where there are no more CPUs than the threads of a graph fill.

    What other threads would do meanwhile has to wait there, for a CPU or for Python's lock. Where there are more, they do it. A chunk may
    take longer than a few cells do: what comes meanwhile would wait for its end anyway.
    """
    return Here(rows=4096, seconds=2 * CHUNK_SECONDS, arrow_bytes=2**20) if n_cpus <= 2 else Here()


async def others_turn() -> None:
    """Let others of this loop do what they have to, however many chunks wait.

    A request takes several turns of the loop from its first byte to its last. With a chunk between any two of them single cells waited for
    five chunks under ten times the load, and some for seconds.
    """
    began = time.monotonic()
    n_idle = 0
    while n_idle < 2 and (turn := time.monotonic()) - began < CHUNK_SECONDS / 2:
        await asyncio.sleep(0)
        n_idle = n_idle + 1 if time.monotonic() - turn < IDLE_SECONDS else 0


def after_answers(function: Callable[[*Arguments], object], *arguments: *Arguments) -> None:
    """Call it in the next turn of the loop, behind whoever sends an answer that is ready: nobody has to wait for what counts it."""
    asyncio.get_running_loop().call_soon(function, *arguments)
