"""The reference cells nearest to latents: exact, and the same bits for a cell alone or among others.

Distances to all cells come from a matrix product, whose last bits depend on how many rows it has. They only choose candidates: everything
within twice the product's rounding error of the k-th smallest. Candidates are measured again, unit by unit in float64, one cell as
another, and ranked by distance and then by position, so that what is answered depends on the cell alone.

An approximate index (HNSW) would save nothing here: an artifact's 15 MB bound the reference to some ten thousand cells, over which usearch
took 0.13 ms for a cell, and this a like time without error, index or further package (docs/map.md has the figures).
"""

import numpy as np
from numpy.typing import NDArray

from service.contract.reference_cells import ReferenceCells

_ROWS = 64
_GROUPS = 1024
"""Minima of so many groups bound the k-th smallest distance of many cells more quickly than partitioning all of them."""

_MAX_PAIRS = 65_536
"""Candidates that are measured together; many more occur only where reference cells are copies of each other."""


class Nearest:
    """Reference cells, ready to be searched. Safe to call from several threads."""

    def __init__(self, cells: ReferenceCells) -> None:
        """Prepare.

        Args:
            cells: of the artifact.
        """
        self.cells = cells
        latent = cells.latent
        self._norms = np.einsum("ij,ij->i", latent, latent)
        self._largest_norm = float(np.sqrt(self._norms.max()))
        self._exact = latent.astype(np.float64)

    def __len__(self) -> int:
        return len(self.cells)

    def search(self, latent: NDArray[np.float32], k: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Positions and Euclidean distances of the `k` nearest reference cells, nearest first; equally near ones by position.

        Args:
            latent: finite, shape (n_cells, n_latent).
            k: at least 1, at most `len(self)`.

        Returns:
            int32 and float64, both of shape (n_cells, k). Each row has the same bits whatever the other rows are.
        """
        positions = np.empty((len(latent), k), dtype=np.int32)
        distances = np.empty((len(latent), k), dtype=np.float64)
        for start in range(0, len(latent), _ROWS):
            rows = slice(start, min(start + _ROWS, len(latent)))
            is_near = self._candidates(latent[rows], k)
            # A few cells at a time where copies of each other make very many candidates.
            step = max(1, _MAX_PAIRS // max(1, int(is_near.sum(axis=1).max())))
            for first in range(0, len(is_near), step):
                some = slice(start + first, min(start + first + step, rows.stop))
                positions[some], distances[some] = self._measure(latent[some], is_near[first : first + step], k)
        return positions, distances

    def _candidates(self, latent: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
        """Which reference cells can be among the `k` nearest of each cell, shape (n_cells, n_reference)."""
        norms = np.einsum("ij,ij->i", latent, latent)
        squares = self._norms - 2.0 * (latent @ self.cells.latent.T)
        if len(self) <= 4 * _GROUPS:
            bound = np.partition(squares, k - 1, axis=1)[:, k - 1]
        else:
            n_whole = len(self) // _GROUPS * _GROUPS
            minima = squares[:, :n_whole].reshape(len(latent), -1, _GROUPS).min(axis=1)
            bound = np.partition(minima, k - 1, axis=1)[:, k - 1]
        # Rounding of two squared norms and a product of n terms each (Higham 2002, Accuracy and Stability, 3.1), doubled to be safe.
        n_terms = latent.shape[1] + 8
        error = 2.0 * n_terms * 2.0**-24 * (np.sqrt(norms) + self._largest_norm) ** 2
        limit = bound + 2.0 * error
        # NaN compares with nothing: then all are candidates, so that k can be given.
        near: NDArray[np.bool_] = (squares <= limit[:, None]) | np.isnan(limit)[:, None]
        return near

    def _measure(
        self, latent: NDArray[np.float32], is_near: NDArray[np.bool_], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The `k` nearest of the candidates."""
        rows, candidates = np.nonzero(is_near)
        squares = np.zeros(len(rows))
        for unit in range(latent.shape[1]):
            difference = self._exact[candidates, unit] - latent[rows, unit]
            squares += difference * difference
        order = np.lexsort((candidates, squares, rows))
        starts = np.concatenate([[0], np.cumsum(is_near.sum(axis=1))[:-1]])
        chosen = order[starts[:, None] + np.arange(k)]
        return candidates[chosen].astype(np.int32), np.sqrt(squares[chosen])
