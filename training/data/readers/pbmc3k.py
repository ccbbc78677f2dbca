"""pbmc3k: the blood cells of every tutorial, published as ln(1 + counts per 10,000); the raw counts are restored from it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from training.data.readers.rdata_file import read_rdata

BROAD = {
    "Naive CD4 T": "CD4 T",
    "Memory CD4 T": "CD4 T",
    "CD8 T": "CD8 T",
    "NK": "NK",
    "B": "B",
    "CD14+ Mono": "Monocyte",
    "FCGR3A+ Mono": "Monocyte",
    "DC": "Dendritic",
    "Platelet": "Platelet",
}
TARGET_SUM = 10_000
TOLERANCE = 1e-6
"""Largest distance of a restored count from an integer. Found: 2e-13."""


class CountsNotRestored(Exception):
    """Undoing the published normalisation did not give integers."""


def restore_counts(log_normalised: sp.csr_matrix, library_size: np.ndarray) -> sp.csr_matrix:
    """Undo ln(1 + counts / library_size x 10,000).

    Args:
        log_normalised: shape (n_cells, n_genes).
        library_size: counts per cell, shape (n_cells,).

    Returns:
        Raw counts, float32 CSR of the same shape.

    Raises:
        CountsNotRestored: a value is further than 1e-6 from an integer.
    """
    counts = log_normalised.tocsr().astype(np.float64)
    counts.data = np.expm1(counts.data) * np.repeat(library_size, np.diff(counts.indptr)) / TARGET_SUM
    whole = np.rint(counts.data)
    furthest = float(np.abs(counts.data - whole).max(initial=0.0))
    if not furthest <= TOLERANCE:
        raise CountsNotRestored(
            f"A restored count is {furthest:.3g} away from an integer (allowed: {TOLERANCE:g}). The matrix and the library sizes "
            "are not of the same cells, or the normalisation was another one."
        )
    counts.data = whole
    return counts.astype(np.float32)


def read_pbmc3k(files: Mapping[str, Path]) -> AnnData:
    """2,638 cells with Seurat's labels; genes have symbols only.

    Raises:
        CountsNotRestored: the published values are not what they are said to be.
    """
    matrix = next(iter(read_rdata(files["pbmc_matrix.rda"]).values()))
    meta = next(iter(read_rdata(files["pbmc_meta.rda"]).values()))
    original = meta["classified"].astype(str).to_numpy()
    obs = pd.DataFrame(
        {
            "batch": "pbmc3k",
            "cell_type": [BROAD[label] for label in original],
            "cell_type_original": original,
            "published_split": "train",
        },
        index=meta.index.astype(str),
    )
    symbol = matrix.row_names
    var = pd.DataFrame({"gene_id": "", "gene_symbol": symbol}, index=symbol)
    counts = restore_counts(sp.csr_matrix(matrix.values.T), meta["nCount_RNA"].to_numpy(np.float64))
    return AnnData(counts, obs=obs, var=var)
