"""What the nearest reference cells say of a cell: their labels, and the vote that these make."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from service.contract.manifest import Vote
from service.inference.model import Model


def vote(model: Model, latent: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Shares of the votes of the nearest reference cells, by label level.

    Args:
        model: with `manifest.reference.vote`.
        latent: shape (n_cells, n_latent).

    Returns:
        For each level of `vote.answers`, float32 (n_cells, n_classes), each row summing to 1, or to 0 where no neighbour has a label. A
        cell's shares are the same bits whatever the other cells are.
    """
    reference = model.manifest.reference
    assert model.reference is not None, "the caller looks"
    assert reference is not None
    assert reference.vote is not None
    positions, distances = model.reference.search(latent, reference.vote.n_neighbours)
    n_classes = {
        level.name: len(level.classes) for level in model.manifest.labels if level.name in reference.vote.answers
    }
    return shares(reference.vote, model.reference.cells.labels, n_classes, positions, distances)


def shares(
    how: Vote,
    labels: Mapping[str, NDArray[np.int32]],
    n_classes: Mapping[str, int],
    positions: NDArray[np.int32],
    distances: NDArray[np.float64],
) -> dict[str, NDArray[np.float32]]:
    """As `vote`, of neighbours that were searched already.

    Args:
        how: `n_neighbours` and `weighting`.
        labels: of the reference cells, by level.
        n_classes: by level; for these there is a vote.
        positions: of the nearest reference cells, nearest first, shape (n_cells, at least n_neighbours).
        distances: likewise.
    """
    positions, distances = positions[:, : how.n_neighbours], distances[:, : how.n_neighbours]
    weights = _weights(distances) if how.weighting == "distance" else np.ones_like(distances)
    rows = np.arange(len(positions))
    found = {}
    for level, n in n_classes.items():
        # One more column takes the votes of cells without a label, which are -1 and do not count.
        total = np.zeros((len(positions), n + 1))
        # Neighbour by neighbour: added up in one order, however many cells there are.
        for rank in range(positions.shape[1]):
            total[rows, labels[level][positions[:, rank]]] += weights[:, rank]
        votes = np.zeros(len(positions))
        for label in range(n):
            votes += total[:, label]
        found[level] = (total[:, :n] / np.where(votes > 0, votes, 1.0)[:, None]).astype(np.float32)
    return found


def _weights(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + d² / s²), s² being the mean of a cell's d²: by sums and quotients only, which round alike on every machine."""
    squares = distances * distances
    total = np.zeros(len(squares))
    for rank in range(squares.shape[1]):
        total += squares[:, rank]
    scale = np.where(total > 0, total / squares.shape[1], 1.0)
    weights: NDArray[np.float64] = 1.0 / (1.0 + squares / scale[:, None])
    return weights
