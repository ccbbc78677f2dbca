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


def rank_seurat_v3(cells: TrainingCells, n_genes: int) -> NDArray[np.float64]:
    """Variance of standardised, clipped counts, ranked per batch (Stuart et al. 2019, doi:10.1016/j.cell.2019.05.031; scanpy's "seurat_v3")."""
    obs = pd.DataFrame({"batch": pd.Categorical(cells.batch)}, index=[str(i) for i in range(len(cells.batch))])
    table = ad.AnnData(cells.counts, obs=obs)
    sc.pp.highly_variable_genes(table, n_top_genes=n_genes, flavor="seurat_v3", batch_key="batch", subset=False)
    median = table.var["highly_variable_rank"].fillna(np.inf).to_numpy(float)
    n_batches = table.var["highly_variable_nbatches"].to_numpy(float)
    # As scanpy does: first the median rank in the batches where a gene is chosen, then their number, then the variance.
    order = np.lexsort((-table.var["variances_norm"].fillna(-np.inf).to_numpy(float), -n_batches, median))
    return -np.argsort(order, kind="stable").astype(float)


def rank_variance(cells: TrainingCells, n_genes: int) -> NDArray[np.float64]:  # noqa: ARG001 - a rule's signature
    """Variance of the raw counts (scVAE's keep_highest_variances)."""
    return variance_of(cells.counts)


def variance_of(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Variance of each gene's counts over cells, shape (n_genes,)."""
    values = counts.astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    return np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2


BY_NAME = "names"
"""The rule that is no rank: a list of genes."""

RULES: dict[str, Callable[[TrainingCells, int], NDArray[np.float64]]] = {
    "seurat": rank_seurat,
    "seurat_v3": rank_seurat_v3,
    "log_variance": rank_log_variance,
    "variance": rank_variance,
    "expressed": rank_expressed,
}


class NoGenes(Exception):
    """No gene is left to train on, or one that is asked for is not there."""


def select_named(var: pd.DataFrame, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Positions of the genes called `names`, by Ensembl id or symbol, ascending.

    Raises:
        NoGenes: with all the names that the data do not have.
    """
    position = {}
    for column in ("gene_symbol", "gene_id"):
        position |= {name: i for i, name in enumerate(var[column].astype(str)) if name}
    if missing := [name for name in names if name not in position]:
        raise NoGenes(f"The data lack {len(missing)} of {len(names)} genes of genes.names: {', '.join(missing[:20])}.")
    return np.unique([position[name] for name in names])


def select_genes(
    cells: TrainingCells, rule: str, n_genes: int, min_cells: int, min_variance: float = 0.0
) -> NDArray[np.int64]:
    """Positions of the genes that a model takes.

    Args:
        cells: training cells.
        rule: a key of RULES; it gives each gene a rank, higher is better.
        n_genes: how many are kept.
        min_cells: genes seen in fewer training cells of any one batch are left out first.
        min_variance: so are genes whose counts vary less.

    Returns:
        Ascending positions, at most n_genes.

    Raises:
        NoGenes: none passes.
    """
    n_seen = np.stack([(cells.counts[cells.batch == batch] > 0).sum(axis=0).A1 for batch in np.unique(cells.batch)])
    is_candidate = (n_seen >= min_cells).all(axis=0)
    if min_variance:
        is_candidate &= variance_of(cells.counts) >= min_variance
    candidates = np.flatnonzero(is_candidate)
    if not len(candidates):
        raise NoGenes(
            f"No gene is left: none of {cells.counts.shape[1]:,} is seen in {min_cells} training cells of every batch with a variance of "
            f"{min_variance:g} or more. Lower genes.min_cells or genes.min_variance."
        )
    n_genes = min(n_genes, len(candidates))
    score = RULES[rule](cells._replace(counts=cells.counts[:, candidates].tocsr()), n_genes)
    # Stable, so that equal ranks fall the same way everywhere.
    return np.sort(candidates[np.argsort(-score, kind="stable")[:n_genes]])
