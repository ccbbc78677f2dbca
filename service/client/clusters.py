"""Majority labels over clusters: an answer that depends on the other cells, and is made where all of them are."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2


def over_cluster(latent: np.ndarray[Any, Any], n_clusters: int | None = None, seed: int = 0) -> list[str]:
    """More clusters than there are types, for majority labels: seeded k-means on the latent, the same for the same cells.

    Args:
        latent: shape (n_cells, n_latent), for example obsm of what `Client.embed` gives.
        n_clusters: by default one per 30 cells, and at most 300.
        seed: of the centres to begin with.

    Returns:
        The name of each cell's cluster.
    """
    wanted = n_clusters or min(300, max(1, len(latent) // 30))
    _, number = kmeans2(np.asarray(latent, dtype=np.float64), wanted, minit="++", seed=seed, missing="warn")
    return [str(one) for one in number]


def majority_labels(
    labels: Iterable[str], clusters: Iterable[str], min_share: float = 0.0
) -> tuple[list[str], dict[str, float]]:
    """The label that most cells of each cell's cluster have, and the share of them that do by cluster; as CellTypist's majority voting.

    It depends on the other cells, which `predicted_labels` never do.

    Args:
        labels: of each cell.
        clusters: of each cell; finer than the types that are looked for.
        min_share: below it all cells of a cluster are `Heterogeneous`. Of two labels that are as frequent the first by name wins.
    """
    of_cell = [str(name) for name in clusters]
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for label, name in zip(labels, of_cell, strict=True):
        votes[name][label] += 1
    best = {name: max(sorted(numbers), key=numbers.__getitem__) for name, numbers in votes.items()}
    shares = {name: votes[name][label] / votes[name].total() for name, label in best.items()}
    return [best[name] if shares[name] >= min_share else "Heterogeneous" for name in of_cell], shares
