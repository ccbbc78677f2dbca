"""Conformal prediction sets: the scores that travel with a model, and how sets of several kinds do on cells that set nothing."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from service.contract.annotation import SetSize
from service.inference.conformal import group_scores, others

MIN_CLASS = 100
"""Calibration cells that a class needs for a quantile of its own; of fewer a quantile of 95 % hangs on the last few."""

COVERAGES = (0.8, 0.9, 0.95)
RAPS_PENALTY, RAPS_FREE = 0.01, 2
"""Of each class beyond the second, as in Angelopoulos et al. 2021 (arXiv:2009.14193)."""

Array = NDArray[np.float64]


def score(kind: str, probabilities: Array) -> Array:
    """How unlike each class is for each cell, (n_cells, n_classes): lac, aps or raps, nothing drawn at random."""
    if kind == "lac":
        return others(probabilities)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    summed = np.take_along_axis(np.cumsum(np.take_along_axis(probabilities, order, axis=1), axis=1), rank, axis=1)
    if kind == "aps":
        return np.asarray(summed)
    return np.asarray(summed + RAPS_PENALTY * np.maximum(rank + 1 - RAPS_FREE, 0))


def true_scores(probabilities: Array, labels: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    """`scores` and `classes` of cells with a label, as the artifact holds them."""
    known = labels >= 0
    found = score("lac", probabilities[known])[np.arange(int(known.sum())), labels[known]]
    return {"scores": found, "classes": labels[known].astype(np.int32)}


def sizes(
    level: str, without: Mapping[int, Array], labels: NDArray[np.int64], fold: NDArray[np.int64]
) -> list[SetSize]:
    """Coverage and mean size of sets of each kind, each part of the cells with the maps and quantiles of the others.

    Args:
        level: name of the label level.
        without: for each part the probabilities of all cells, (n_cells, n_classes), by maps that were fitted without that part.
        labels: true classes, (n_cells,); -1 for none.
        fold: part of each cell, (n_cells,).
    """
    known = labels >= 0
    labels, fold = labels[known], fold[known]
    rows = np.arange(len(labels))
    found = []
    for kind in ("lac", "aps", "raps"):
        every = {number: score(kind, probabilities[known]) for number, probabilities in without.items()}
        for asked in COVERAGES:
            is_in = np.zeros((len(labels), next(iter(every.values())).shape[1]), bool)
            for number, scores in every.items():
                rest = fold != number
                true = scores[rows, labels]
                made = group_scores(true[rest], labels[rest].astype(np.int32), scores.shape[1], MIN_CLASS)
                is_in[~rest] = scores[~rest] <= made.limits(asked)
            found.append(
                SetSize(
                    score=kind,
                    level=level,
                    asked=asked,
                    coverage=float(is_in[rows, labels].mean()),
                    mean_size=float(is_in.sum(axis=1).mean()),
                )
            )
    return found
