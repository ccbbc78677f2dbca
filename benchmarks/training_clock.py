"""A Lightning callback that both sides of training_speed.py time their epochs with; it knows nothing of either."""

import time
from typing import Any

import lightning


class Clock(lightning.Callback):
    """Seconds and cells of each epoch's training steps, and the time at which each epoch began."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.steps_seconds: list[float] = []
        self.n_cells: list[int] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - Lightning's signature
        """An epoch begins."""
        self.began.append(time.perf_counter())
        self.steps_seconds.append(0.0)
        self.n_cells.append(0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """A step is done."""
        self.n_cells[-1] += (batch["X"] if isinstance(batch, dict) else batch).shape[0]
        self.steps_seconds[-1] = time.perf_counter() - self.began[-1]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """The last epoch is over, with its validation and checkpoints."""
        self.began.append(time.perf_counter())

    def summary(self) -> dict[str, list[float]]:
        """Cells per second by epoch, without the first, which pays for what is done once."""
        whole = [after - before for before, after in zip(self.began, self.began[1:], strict=False)]
        return {
            "steps": [n / seconds for n, seconds in zip(self.n_cells[1:], self.steps_seconds[1:], strict=True)],
            "epoch": [n / seconds for n, seconds in zip(self.n_cells[1:], whole[1:], strict=True)],
        }
