"""Where a request's time goes before it is queued, as metrics, headers and spans have it."""

import time

from service import tracing


def until_queue(started: float, received: float, seconds: dict[str, float]) -> dict[str, float]:
    """The stages that have just ended, in the order in which they were; recorded in the request's trace where it has one.

    Args:
        started: when reading the body began, on the clock of `time.monotonic`.
        received: when all of it was there.
        seconds: of `parse` and `align`, as they ran.

    Returns:
        Seconds by stage, with `read` and `parse_wait`: for a thread that parses, and for coming back from it.
    """
    now = time.monotonic()
    waited = max(0.0, now - received - sum(seconds.values()))
    spent = {"read": received - started, "parse_wait": waited, **seconds}
    if (trace := tracing.current.get()) is not None:
        trace.lay(now, spent)
    return spent
