"""The label that most cells of a cluster were given, as CellTypist's majority voting: it depends on the other cells, and says so."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HETEROGENEOUS = "Heterogeneous"
"""CellTypist's word for a cluster in which no label has the share that was asked for."""


@dataclass(frozen=True)
class Vote:
    """What the cells of one cluster were taken for."""

    n_cells: int
    majority_label: str
    share: float
    """Of its cells, that were given the most frequent label."""

    labels: dict[str, float]
    """Share of each label that occurs, the most frequent first."""


def majority_labels(
    clusters: Sequence[str], codes: NDArray[np.int32], words: Sequence[str], min_share: float = 0.0
) -> dict[str, Vote]:
    """The vote of each cluster, in the order of their names.

    Args:
        clusters: of each cell.
        codes: label of each cell, by its position in `words`.
        words: labels. Of two that are as frequent the earlier wins.
        min_share: a cluster whose most frequent label has less is `Heterogeneous`.
    """
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    table = np.bincount(index * len(words) + codes, minlength=len(names) * len(words)).reshape(len(names), len(words))
    votes = {}
    for name, numbers in zip(names, table, strict=True):
        n_cells, best = int(numbers.sum()), int(numbers.argmax())
        share = float(numbers[best] / n_cells)
        order = np.argsort(-numbers, kind="stable")
        votes[str(name)] = Vote(
            n_cells=n_cells,
            majority_label=words[best] if share >= min_share else HETEROGENEOUS,
            share=share,
            labels={words[i]: float(numbers[i] / n_cells) for i in order if numbers[i]},
        )
    return votes
