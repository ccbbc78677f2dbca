# ruff: noqa: ARG002 - Lightning's signatures
"""What one sees and keeps of a running fit: a progress bar and metrics.csv."""

import csv
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Bar(Progress):
    """A bar with a line of text below."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the line where there is one."""
        yield from super().get_renderables()
        if self.line:
            yield Text(self.line, style="dim")


class ProgressBar(lightning.Callback):
    """One bar over all epochs with loss, cells per second and the time left, should early stopping spare no epoch; below, the loss's parts."""

    def __init__(self, is_validated: bool = True) -> None:
        validation = " | validation {task.fields[validation]:.4g}" if is_validated else ""
        self._progress = _Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=16),
            TextColumn(f"loss {{task.fields[loss]:.4g}}{validation}"),
            TextColumn("{task.fields[speed]:,.0f} cells/s"),
            TextColumn("left:"),
            TimeRemainingColumn(compact=True),
        )
        self._fields: dict[str, Any] = {"epoch": "0", "loss": float("nan"), "validation": float("nan"), "speed": 0.0}
        self._n_cells, self._started = 0, 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to draw."""
        total = trainer.max_epochs * trainer.num_training_batches
        done = trainer.current_epoch * trainer.num_training_batches
        self._task = self._progress.add_task("fit", total=total, completed=done, **self._fields)
        self._progress.start()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One minibatch further."""
        self._n_cells += batch.shape[0]
        speed = self._n_cells / (time.perf_counter() - self._started)
        epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
        # Reading the loss waits for the device, so it is done once in a while.
        if batch_idx % 10 == 0:
            self._fields["loss"] = float(outputs["loss"])
            parts = {name: value for name, value in pl_module.parts.items() if name != "loss"}
            self._progress.line = "  ".join(f"{name} {value:.4g}" for name, value in parts.items())
        validation = float(trainer.callback_metrics.get("validation_loss", float("nan")))
        self._fields.update(epoch=epoch, speed=speed, validation=validation)
        self._progress.update(self._task, advance=1, **self._fields)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leave the bar as it stands, however the fit ended."""
        self._progress.stop()


class MetricsLog(lightning.Callback):
    """Writes one line per epoch to a CSV file; a resumed run goes on where its checkpoint was taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the lines of the epochs before the checkpoint."""
        self._started = time.perf_counter()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if trainer.current_epoch and self.path.exists():
            with self.path.open(newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write all lines, so that the file is whole after each epoch."""
        metrics = {name: f"{float(value):.8g}" for name, value in sorted(trainer.callback_metrics.items())}
        seconds = f"{time.perf_counter() - self._started:.3f}"
        self._rows.append({"epoch": trainer.current_epoch, **metrics, "seconds": seconds})
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self._rows[-1]), extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(self._rows)
