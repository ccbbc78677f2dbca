"""Which cells are used at all."""

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from training.config import CellFilter

_ROWS = 16_384
"""Cells that are looked at together, so that counts on disk are never whole in memory."""


class NoCells(Exception):
    """No cell passes the filters, or one of them names a column that is not there."""


def keep_cells(cells: AnnData, wanted: CellFilter, name: str, seed: int) -> NDArray[np.bool_]:
    """Which cells pass, shape (n_cells,).

    Args:
        cells: of one data set; X may be on disk.
        wanted: bounds and values.
        name: of the data set, for errors.
        seed: of the draw where there are more than `max_cells`.

    Raises:
        NoCells: none passes, or a column is not there.
    """
    keep = np.ones(cells.n_obs, dtype=bool)
    for key, values, is_kept in [
        *((key, values, True) for key, values in wanted.keep.items()),
        *((key, values, False) for key, values in wanted.drop.items()),
    ]:
        if key not in cells.obs:
            raise NoCells(
                f"'{name}' has no column '{key}' in obs, which the cell filter names. It has {', '.join(cells.obs.columns)}."
            )
        keep &= cells.obs[key].astype(str).isin(values).to_numpy() == is_kept
    if any(
        bound is not None for bound in (*_pair(wanted, "counts"), *_pair(wanted, "genes"), wanted.max_mitochondrial)
    ):
        counts, genes, mitochondrial = measure_cells(cells)
        for value, (low, high) in ((counts, _pair(wanted, "counts")), (genes, _pair(wanted, "genes"))):
            keep &= (value >= (low or 0)) & (value <= (np.inf if high is None else high))
        if wanted.max_mitochondrial is not None:
            keep &= mitochondrial <= wanted.max_mitochondrial * counts
    if not keep.any():
        raise NoCells(f"None of the {cells.n_obs:,} cells of '{name}' passes the cell filter. Loosen `cells`.")
    if wanted.max_cells is not None and keep.sum() > wanted.max_cells:
        drawn = np.random.default_rng(seed).choice(np.flatnonzero(keep), wanted.max_cells, replace=False)
        keep = np.isin(np.arange(cells.n_obs), drawn)
    return keep


def measure_cells(cells: AnnData) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Counts, genes with a count, and mitochondrial counts of each cell, each of shape (n_cells,)."""
    is_mitochondrial = cells.var["gene_symbol"].astype(str).str.upper().str.startswith("MT-").to_numpy(np.float64)
    found = []
    for start in range(0, cells.n_obs, _ROWS):
        block = sp.csr_matrix(cells.X[start : start + _ROWS]).astype(np.float64)
        found.append((np.asarray(block.sum(axis=1)).ravel(), np.diff(block.indptr), block @ is_mitochondrial))
    counts, genes, mitochondrial = (np.concatenate(part) for part in zip(*found, strict=True))
    return counts, genes, mitochondrial


def _pair(wanted: CellFilter, kind: str) -> tuple[float | None, float | None]:
    return getattr(wanted, f"min_{kind}"), getattr(wanted, f"max_{kind}")
