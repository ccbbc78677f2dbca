"""What an answer says of the answer cache."""

from service.inference.work import Timing

HEADER = "X-Cellserve-Cache"


def cache_header(n_rows: int, *timings: Timing) -> dict[str, str]:
    """How many cells the cache knew and did not, over one run of `n_rows` per timing; nothing where there is no cache."""
    hits = [timing.n_hits for timing in timings if timing.n_hits is not None]
    if not hits:
        return {}
    return {HEADER: f"hits={sum(hits)}, misses={n_rows * len(hits) - sum(hits)}"}
