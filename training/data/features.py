"""Which genes a model takes. Every rule looks at training cells only."""

from collections.abc import Callable
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from numpy.typing import NDArray


class TrainingCells(NamedTuple):
    """What a rule may look at."""

    counts: sp.csr_matrix
    """Raw counts, shape (n_cells, n_genes)."""

    batch: NDArray[np.int64]
    """Shape (n_cells,)."""

    label: NDArray[np.int64]
    """Class of the first label level, -1 for none; shape (n_cells,)."""


def _log_normalised(counts: sp.csr_matrix) -> sp.csr_matrix:
    library_size = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return (sp.diags(1e4 / library_size) @ counts).log1p().tocsr()


def rank_seurat(cells: TrainingCells, n_genes: int) -> NDArray[np.float64]:
    """Normalised dispersion of log-normalised expression, per batch (Satija et al. 2015, doi:10.1038/nbt.3192; scanpy's "seurat")."""
    table = ad.AnnData(_log_normalised(cells.counts), obs=pd.DataFrame(index=[str(i) for i in range(len(cells.batch))]))
    table.obs["batch"] = pd.Categorical(cells.batch)
    sc.pp.highly_variable_genes(table, n_top_genes=n_genes, flavor="seurat", batch_key="batch", subset=False)
    n_batches = table.var["highly_variable_nbatches"].to_numpy(float)
    dispersion = table.var["dispersions_norm"].fillna(-np.inf).to_numpy(float)
    # As scanpy does: first the number of batches in which a gene varies, then how much.
    return np.argsort(np.lexsort((dispersion, n_batches))).astype(float)


def rank_log_variance(cells: TrainingCells, n_genes: int) -> NDArray[np.float64]:  # noqa: ARG001 - a rule's signature
    """Variance of log-normalised expression above its trend, the rank averaged over batches.

    The trend is a quadratic of log variance in log mean, as in scran's and Seurat's vst (Stuart et al. 2019, doi:10.1016/j.cell.2019.05.031).
    """
    ranks = []
    for batch in np.unique(cells.batch):
        values = _log_normalised(cells.counts[cells.batch == batch]).astype(np.float64)
        mean = np.asarray(values.mean(axis=0)).ravel()
        variance = np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2
        is_seen = mean > 0.005
        log_mean, log_variance = np.log(mean[is_seen]), np.log(variance[is_seen] + 1e-9)
        above = np.full(len(mean), -np.inf)
        above[is_seen] = log_variance - np.polyval(np.polyfit(log_mean, log_variance, 2), log_mean)
        ranks.append(np.argsort(np.argsort(above, kind="stable"), kind="stable"))
    return np.mean(ranks, axis=0)


def rank_expressed(cells: TrainingCells, n_genes: int) -> NDArray[np.float64]:  # noqa: ARG001 - a rule's signature
    """Mean count."""
    return np.asarray(cells.counts.mean(axis=0)).ravel()


RULES: dict[str, Callable[[TrainingCells, int], NDArray[np.float64]]] = {
    "seurat": rank_seurat,
    "log_variance": rank_log_variance,
    "expressed": rank_expressed,
}


def select_genes(cells: TrainingCells, rule: str, n_genes: int, min_cells: int) -> NDArray[np.int64]:
    """Positions of the genes that a model takes.

    Args:
        cells: training cells.
        rule: a key of RULES; it gives each gene a rank, higher is better.
        n_genes: how many are kept.
        min_cells: genes seen in fewer training cells of any one batch are left out first.

    Returns:
        Ascending positions, at most n_genes.
    """
    n_seen = np.stack([(cells.counts[cells.batch == batch] > 0).sum(axis=0).A1 for batch in np.unique(cells.batch)])
    candidates = np.flatnonzero((n_seen >= min_cells).all(axis=0))
    n_genes = min(n_genes, len(candidates))
    score = RULES[rule](cells._replace(counts=cells.counts[:, candidates].tocsr()), n_genes)
    # Stable, so that equal ranks fall the same way everywhere.
    return np.sort(candidates[np.argsort(-score, kind="stable")[:n_genes]])
