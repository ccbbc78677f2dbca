"""metrics.csv of a run: losses by epoch, and a plot of them."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.fit import METRICS
from training.report.drawing import Image, draw

_PARTS = ("train", "validation")


@dataclass(frozen=True)
class Curves:
    """Losses by epoch."""

    epoch: NDArray[np.int64]
    """Counted from 1."""

    values: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """By name of the loss ("loss" first, then its parts) and by "train" or "validation"; NaN where there is none."""

    seconds: float
    """Of the last process that trained, as far as its last epoch."""


def read(directory: Path) -> Curves | None:
    """Losses of a run; None where it kept none."""
    path = directory / METRICS
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    columns = dict.fromkeys(name for row in rows for name in row)
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    for column in columns:
        part, _, name = column.partition("_")
        if part in _PARTS and name:
            found = np.array([float(row[column]) if row.get(column) else np.nan for row in rows])
            values.setdefault(name, {})[part] = found
    ordered = {name: values[name] for name in sorted(values, key=lambda name: (name != "loss", name))}
    epoch = np.array([int(row["epoch"]) + 1 for row in rows])
    return Curves(epoch, ordered, float(rows[-1].get("seconds") or "nan"))


def plot(curves: Curves, best_epoch: int) -> Image:
    """One panel for the loss and one for each of its parts, training and validation; a line marks the best epoch, counted from 1.

    Without validation losses no epoch is best, and there is no line.
    """
    is_validated = any("validation" in parts for parts in curves.values.values())
    n_columns = min(3, len(curves.values))
    n_rows = -(-len(curves.values) // n_columns)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        for panel in panels[len(curves.values) :]:
            panel.set_axis_off()
        for panel, (name, parts) in zip(panels, curves.values.items(), strict=False):
            for part, values in parts.items():
                finite = np.isfinite(values)
                marker = "." if finite.sum() < 15 else ""
                panel.plot(curves.epoch[finite], values[finite], label=part, marker=marker, linewidth=1.2)
            if is_validated:
                panel.axvline(best_epoch, color="0.6", linewidth=0.8, linestyle="--", label="best epoch")
            panel.set_title(name)
            panel.set_xlabel("epoch")
        panels[0].legend()

    names, n_epochs = ", ".join(curves.values), len(curves.epoch)
    text = f"Training {names} over {n_epochs} epochs; there are no validation cells."
    if is_validated:
        text = f"Training and validation {names} over {n_epochs} epochs; the best is epoch {best_epoch}."
    return draw("curves", text, (3.6 * n_columns, 2.6 * n_rows), paint)
