"""The end of a process: it is said to be not ready, takes no new work, lets work in flight complete, and ends in bounded time."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from service.api.state import State

logger = logging.getLogger("cellserve.drain")
PROBES = frozenset({"/livez", "/readyz", "/metrics"})
CLOSING_SECONDS = 2.0
"""What remains for closing connections once nothing is computed any more."""


def drain_on_signal(state: State, seconds: float) -> None:
    """Drain when SIGTERM or SIGINT arrives, and only then let the server's own handler have it.

    uvicorn's handler stops listening at once: who connects then is refused by nobody and answered by nobody as long as a parent holds the
    socket, as BentoML's does. So the server listens on while work is in flight, and says 503.

    Args:
        state: of the process; called in its event loop, in the main thread.
        seconds: that work in flight may take.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def begin(before: Any = before, number: int = number) -> None:
            if state.is_draining:
                return  # a process group gets the signal twice, from the parent and from outside
            state.is_draining = True
            tasks.add(loop.create_task(_drain(state, seconds, lambda: _hand_on(before, number))))

        def handle(_: int, __: FrameType | None, begin: Callable[[], None] = begin) -> None:
            loop.call_soon_threadsafe(begin)

        signal.signal(number, handle)


async def _drain(state: State, seconds: float, hand_on: Callable[[], None]) -> None:
    logger.info("draining", extra={"n_in_flight": state.n_in_flight, "limit_seconds": seconds})
    deadline = time.monotonic() + seconds
    while state.n_in_flight and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if state.n_in_flight:
        logger.error("not all work could be completed", extra={"n_in_flight": state.n_in_flight})
        await state.batcher.stop()  # what waits is told so
    # Whoever neither reads nor leaves must not keep the process: this comes to nothing where the loop ends before.
    asyncio.get_running_loop().call_later(CLOSING_SECONDS, _end)
    hand_on()


def _hand_on(before: Any, number: int) -> None:
    if callable(before):
        before(number, None)
    else:
        raise SystemExit(0)


def _end() -> None:
    logger.error("connections do not close; the process ends")
    os._exit(1)
