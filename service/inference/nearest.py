"""The reference cells nearest to latents: exact, and the same bits for a cell alone or among others.

Distances to all cells come from a matrix product, whose last bits depend on how many rows it has. They only choose candidates: everything
within twice the product's rounding error of the k-th smallest. Candidates are measured again, unit by unit in float64, one cell as
another, and ranked by distance and then by position, so that what is answered depends on the cell alone.

There is no approximate index (HNSW): an artifact's 15 MB bound the reference to some ten thousand cells, over which it would save little
and cost a large package; docs/map.md has the figures.
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
        norms = np.einsum("ij,ij->i", cells.latent, cells.latent)
        self._largest_norm = float(np.sqrt(norms.max()))
        # |r|² - 2 q·r for all r in one product, (n_latent + 1, n_reference): what is missing, |q|², changes no order.
        self._factors = np.ascontiguousarray(np.vstack([-2.0 * cells.latent.T, norms]), dtype=np.float32)
        self._exact = np.ascontiguousarray(cells.latent.T, dtype=np.float64)

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
        squares = np.empty((min(_ROWS, len(latent)), len(self)), dtype=np.float32)
        for start in range(0, len(latent), _ROWS):
            rows = slice(start, min(start + _ROWS, len(latent)))
            is_near = self._candidates(latent[rows], k, squares[: rows.stop - start])
            # A few cells at a time where copies of each other make very many candidates.
            step = max(1, _MAX_PAIRS // int(np.count_nonzero(is_near, axis=1).max()))
            for first in range(0, len(is_near), step):
                some = slice(start + first, min(start + first + step, rows.stop))
                positions[some], distances[some] = self._measure(latent[some], is_near[first : first + step], k)
        return positions, distances

    def _candidates(self, latent: NDArray[np.float32], k: int, squares: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which reference cells can be among the `k` nearest of each cell; this and `squares`, which is overwritten, (n_cells, n_reference)."""
        ones = np.ones((len(latent), 1), dtype=np.float32)
        np.matmul(np.hstack([latent, ones]), self._factors, out=squares)
        if len(self) <= 4 * _GROUPS:
            bound = np.partition(squares, k - 1, axis=1)[:, k - 1]
        else:
            n_whole = len(self) // _GROUPS * _GROUPS
            minima = squares[:, :n_whole].reshape(len(latent), -1, _GROUPS).min(axis=1)
            bound = np.partition(minima, k - 1, axis=1)[:, k - 1]
        # Rounding of a sum of n products, one of which is a sum of n squares (Higham 2002, Accuracy and Stability, 3.1), doubled to be safe.
        norms = np.sqrt(np.einsum("ij,ij->i", latent, latent))
        error = 2.0 * (2 * latent.shape[1] + 8) * 2.0**-24 * (norms + self._largest_norm) ** 2
        limit = bound + 2.0 * error
        # NaN compares with nothing: then all are candidates, so that k can be given.
        near: NDArray[np.bool_] = squares <= limit[:, None]
        near[~np.isfinite(limit)] = True
        return near

    def _measure(
        self, latent: NDArray[np.float32], is_near: NDArray[np.bool_], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The `k` nearest of the candidates."""
        rows, candidates = np.divmod(np.flatnonzero(is_near), len(self))
        squares = np.zeros(len(rows))
        for unit in range(latent.shape[1]):
            difference = self._exact[unit, candidates] - latent[rows, unit]
            squares += difference * difference
        order = np.lexsort((candidates, squares, rows))
        starts = np.searchsorted(rows, np.arange(len(latent)))
        chosen = order[starts[:, None] + np.arange(k)]
        return candidates[chosen].astype(np.int32), np.sqrt(squares[chosen])
