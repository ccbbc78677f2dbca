"""A service as BentoML's own guide has it, to show that the traps which ours avoids are there."""

import threading
import time

import bentoml
from opentelemetry import trace

LOAD_SECONDS = 3.0


def _trace_id() -> str:
    return f"{trace.get_current_span().get_span_context().trace_id:032x}"


@bentoml.service(name="plain", workers=1, threads=1, traffic={"timeout": 1})
class Plain:
    """Some of what a service does."""

    def __init__(self) -> None:
        time.sleep(LOAD_SECONDS)  # a model is being loaded
        self.n_begun = self.n_ended = self.n_now = self.n_most = 0
        self._lock = threading.Lock()

    @bentoml.api
    async def trace_of(self, text: str) -> str:
        """The trace that the request is part of."""
        return _trace_id()

    @bentoml.api(batchable=True)
    def trace_of_batch(self, texts: list[str]) -> list[str]:
        """The trace that what runs together is part of."""
        return [_trace_id()] * len(texts)

    @bentoml.api
    def work(self, seconds: float) -> float:
        """Work that takes its time."""
        with self._lock:
            self.n_begun, self.n_now = self.n_begun + 1, self.n_now + 1
            self.n_most = max(self.n_most, self.n_now)
        time.sleep(seconds)
        with self._lock:
            self.n_ended, self.n_now = self.n_ended + 1, self.n_now - 1
        return seconds

    @bentoml.api
    async def worked(self) -> dict[str, int]:
        """What became of the work."""
        return {"begun": self.n_begun, "ended": self.n_ended, "most": self.n_most}
