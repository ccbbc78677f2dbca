"""Plots of a report."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.report.drawing import Image, draw, legend, scatter
from training.report.measures import Annotation, Reconstruction

_MAX_NUMBERS = 20
"""Classes up to which a confusion matrix has numbers in it."""


def latent(
    planes: dict[str, NDArray[np.float64]], names: NDArray[np.object_], order: Sequence[str], by: str, file: str
) -> Image:
    """All projections side by side, coloured by `names`."""

    def paint(figure: Figure) -> None:
        handles = []
        for panel, (method, points) in zip(figure.subplots(2, 2).ravel(), planes.items(), strict=True):
            handles = scatter(panel, points, names, order)
            panel.set_title(method)
        legend(figure, handles)

    return draw(file, f"{', '.join(planes)} of the latent, coloured by {by}.", (9, 6.5), paint, "png")


def reconstruction(found: Reconstruction) -> Image:
    """Observed against reconstructed counts, per gene and per cell."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for panel, title, observed, predicted in (
            (left, "mean counts per gene", found.observed_gene, found.predicted_gene),
            (right, "counts per cell", found.observed_cell, found.predicted_cell),
        ):
            positive = np.concatenate([values[values > 0] for values in (observed, predicted)])
            # Below the smallest positive value the scale is linear, so that zeros are seen as well.
            threshold = max(float(positive.min()), 1e-4) if len(positive) else 1.0
            panel.set_xscale("symlog", linthresh=threshold)
            panel.set_yscale("symlog", linthresh=threshold)
            panel.scatter(observed, predicted, s=6, alpha=0.4, linewidths=0)
            ends = [float(min(observed.min(), predicted.min())), float(max(observed.max(), predicted.max()))]
            panel.plot(ends, ends, color="0.5", linewidth=0.8)
            panel.set_title(title)
            panel.set_xlabel("observed")
            panel.set_ylabel("reconstructed")

    text = "Observed against reconstructed counts: means of genes at the left, sums of cells at the right; the line is equality."
    return draw("reconstruction", text, (8, 3.8), paint, "png")


def confusion(found: Annotation, file: str) -> Image:
    """Share of each class's cells by answer, with numbers of cells where there is room."""
    n_classes = len(found.classes)
    total = found.confusion.sum(axis=1, keepdims=True)
    share = np.divide(found.confusion, total, out=np.zeros(found.confusion.shape), where=total > 0)

    def paint(figure: Figure) -> None:
        panel = figure.subplots()
        shown = panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
        panel.set_xticks(range(n_classes), found.classes, rotation=90)
        panel.set_yticks(range(n_classes), found.classes)
        panel.set_xlabel("answer of the model")
        panel.set_ylabel("label")
        if n_classes <= _MAX_NUMBERS:
            for (row, column), number in np.ndenumerate(found.confusion):
                if number:
                    colour = "white" if share[row, column] > 0.6 else "black"
                    panel.text(column, row, str(number), ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(shown, label="share of the label's cells", shrink=0.7)

    side = 3.5 + 0.3 * min(n_classes, 40)
    return draw(
        file, f"Confusion matrix of {found.level}: labels in rows, answers in columns.", (side + 1, side), paint
    )


def reliability(found: Annotation, file: str) -> Image:
    """Share of right answers by confidence, and how many cells each bin has."""
    edges = np.linspace(0, 1, len(found.n_in_bin) + 1)
    filled = found.n_in_bin > 0

    def paint(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
        upper.plot(found.confidence[filled], found.correct[filled], marker="o", markersize=4)
        upper.set_ylabel("share right")
        upper.set_ylim(0, 1.02)
        lower.bar(edges[:-1], found.n_in_bin, width=np.diff(edges), align="edge", color="0.7")
        lower.set_ylabel("cells")
        lower.set_xlabel("confidence")

    return draw(file, f"Reliability of {found.level}: share of right answers by confidence.", (4.4, 4.4), paint)
