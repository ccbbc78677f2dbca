"""What the Open Inference Protocol counts: its requests, by model."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Duration:
    """How often something was done, and how long that took in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count, self.ns = self.count + 1, self.ns + round(seconds * 1e9)

    def as_dict(self) -> dict[str, int]:
        """As the protocol writes it."""
        return {"count": self.count, "ns": self.ns}


STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class ModelStatistics:
    """Of one version, since the process started."""

    n_cells: int = 0
    last_inference_ms: int = 0
    """Milliseconds since 1970; 0 where there was none."""

    durations: dict[str, Duration] = field(default_factory=lambda: {stage: Duration() for stage in STAGES})

    def succeeded(self, n_cells: int, seconds: dict[str, float]) -> None:
        """Count an answered request; `seconds` by stage, without `fail`."""
        self.n_cells += n_cells
        self.last_inference_ms = time.time_ns() // 1_000_000
        for stage, spent in seconds.items():
            self.durations[stage].add(spent)

    def as_dict(self) -> dict[str, Any]:
        """`inference_stats`, as the protocol writes them."""
        return {stage: duration.as_dict() for stage, duration in self.durations.items()}


@dataclass
class Statistics:
    """Of all versions. Belongs to one event loop."""

    _by_model: dict[str, ModelStatistics] = field(default_factory=dict)

    def of(self, model: str) -> ModelStatistics:
        """Of name@version, which must be a version that there is: each is kept."""
        return self._by_model.setdefault(model, ModelStatistics())
