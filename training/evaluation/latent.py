"""How well clusters of the latent agree with labels, and how far labels lie apart in it."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)

SILHOUETTE_CELLS = 5_000
"""Cells that the silhouette is computed on, drawn at random where there are more: it takes all pairs."""

N_STARTS = 10
"""Of k-means; the best one is kept."""


def agreement(
    latent: NDArray[np.float32],
    labels: dict[str, NDArray[np.int64]],
    clusters: NDArray[np.int64] | None,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Agreement of k-means (k: the number of classes) and of a mixture's own clusters with each label level, and the silhouette by label.

    Args:
        latent: point estimates, (n_cells, n_latent).
        labels: class of each cell by level, -1 for none; such cells do not count.
        clusters: of the family's mixture, (n_cells,), None where it has none.
        seed: of k-means.

    Returns:
        By level; empty for a level of which fewer than two classes have cells.
    """
    found = {}
    for level, classes in labels.items():
        known = classes >= 0
        truth, points = classes[known], latent[known]
        n_classes = len(np.unique(truth))
        if not 1 < n_classes < len(truth):
            continue
        figures: dict[str, Any] = {"n_cells": len(truth), "n_classes": n_classes}
        with warnings.catch_warnings():
            # Fewer distinct points than clusters: a collapsed latent, whose score of 0 says it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            guess = KMeans(n_classes, n_init=N_STARTS, random_state=seed).fit_predict(points)
        figures["kmeans"] = compare(truth, guess)
        if clusters is not None:
            own = clusters[known]
            figures["mixture"] = {"n_clusters": len(np.unique(own)), **compare(truth, own)}
        figures["silhouette"] = silhouette(points, truth, seed)
        found[level] = figures
    return found


def compare(truth: NDArray[np.int64], clusters: NDArray[np.int64]) -> dict[str, float]:
    """Adjusted Rand index, adjusted and normalised mutual information; 1 for the same partition, about 0 for a random one (NMI: above)."""
    return {
        "ari": float(adjusted_rand_score(truth, clusters)),
        "ami": float(adjusted_mutual_info_score(truth, clusters)),
        "nmi": float(normalized_mutual_info_score(truth, clusters)),
    }


def silhouette(points: NDArray[np.float32], classes: NDArray[np.int64], seed: int) -> float | None:
    """Mean silhouette of cells by class, -1 to 1; None where a draw of SILHOUETTE_CELLS holds one class only."""
    if len(points) > SILHOUETTE_CELLS:
        chosen = np.random.default_rng(seed).choice(len(points), SILHOUETTE_CELLS, replace=False)
        points, classes = points[chosen], classes[chosen]
    if not 1 < len(np.unique(classes)) < len(classes):
        return None
    return float(silhouette_score(points, classes))
