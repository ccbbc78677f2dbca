"""What a data set is like before anything is trained: cells, genes, depth, zeros, batches, classes. One pass, in bounded memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from training.data.counts import check_counts
from training.data.prepared import IS_USED
from training.data.stored_cells import ROWS, row_blocks
from training.evaluation.annotation import log_normalise

SCHEMA_VERSION = 1
"""Of the document; raised when a member changes its meaning or goes."""

N_VARIABLE = 20
"""Genes that are named as the most variable."""

PLOTTED = 5_000
"""Cells on the plot of principal components, drawn at random where there are more."""

QUANTILES = {
    "minimum": 0.0,
    "p05": 0.05,
    "lower_quartile": 0.25,
    "median": 0.5,
    "upper_quartile": 0.75,
    "p95": 0.95,
    "maximum": 1.0,
}


@dataclass(frozen=True)
class Measured:
    """Sums over the cells or the genes of a data set."""

    counts_per_cell: NDArray[np.float64]
    genes_per_cell: NDArray[np.int64]
    total: NDArray[np.float64]
    """Counts of each gene."""

    n_cells: NDArray[np.int64]
    """Cells with a count of each gene."""

    mean: NDArray[np.float64]
    """Of each gene's ln(1 + counts per 10,000)."""

    variance: NDArray[np.float64]
    """Likewise."""

    largest: float
    """Count of all."""

    components: NDArray[np.float64]
    """First two principal components of the cells at `plotted`, (n, 2)."""

    plotted: NDArray[np.int64]

    used: NDArray[np.bool_]
    """Which of the cells of the data set these are: those that pass its filter."""


def measure(cells: AnnData, name: str, seed: int = 0) -> Measured:
    """Read the counts once, block by block.

    Raises:
        BadFile: they are not counts.
    """
    used = cells.obs[IS_USED].to_numpy(dtype=bool) if IS_USED in cells.obs else np.ones(cells.n_obs, dtype=bool)
    n_cells, n_genes = int(used.sum()), cells.n_vars
    stop = 0
    counts_per_cell, genes_per_cell = np.zeros(n_cells), np.zeros(n_cells, dtype=np.int64)
    total, log_sum, log_square = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    expressed = np.zeros(n_genes, dtype=np.int64)
    largest = 0.0
    plotted = np.arange(n_cells)
    if n_cells > PLOTTED:
        plotted = np.sort(np.random.default_rng(seed).choice(n_cells, PLOTTED, replace=False))
    shown = []
    for first, block in row_blocks(cells.X):
        rows = used[first : first + ROWS]
        counts = check_counts(block[rows], Path(name), cells.obs_names[first : first + ROWS][rows], cells.var_names)
        start, stop = stop, stop + counts.shape[0]
        counts_per_cell[start:stop] = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        is_there = counts > 0
        genes_per_cell[start:stop] = np.asarray(is_there.sum(axis=1)).ravel()
        expressed += np.asarray(is_there.sum(axis=0)).ravel()
        total += np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
        values = log_normalise(counts).astype(np.float64)
        log_sum += np.asarray(values.sum(axis=0)).ravel()
        log_square += np.asarray(values.multiply(values).sum(axis=0)).ravel()
        largest = max(largest, float(counts.max()) if counts.nnz else 0.0)
        inside = plotted[np.searchsorted(plotted, start) : np.searchsorted(plotted, stop)]
        shown.append(values[inside - start])
    mean = log_sum / max(n_cells, 1)
    variance = np.maximum(log_square / max(n_cells, 1) - mean**2, 0.0)
    values = sp.vstack(shown, format="csr")
    # arpack has nothing to begin with where all cells are the same.
    components = _components(values, seed) if variance.max(initial=0.0) > 1e-9 else np.zeros((values.shape[0], 2))
    return Measured(
        counts_per_cell, genes_per_cell, total, expressed, mean, variance, largest, components, plotted, used
    )


def _components(values: sp.csr_matrix, seed: int) -> NDArray[np.float64]:
    """First two principal components, (n_cells, 2); zeros where there are too few cells or genes."""
    if min(values.shape) < 3:
        return np.zeros((values.shape[0], 2))
    # arpack centres in passing; a sparse matrix that was centred itself would be dense.
    return PCA(2, svd_solver="arpack", random_state=seed).fit_transform(values)


def describe(cells: AnnData, measured: Measured, name: str, columns: dict[str, str]) -> dict[str, Any]:
    """The document: everything that the tables show, not rounded.

    Args:
        cells: with gene_id and gene_symbol in `var`.
        measured: of these cells.
        name: of the data set.
        columns: columns of `obs` to group by → what they are, "batch" or "class".
    """
    obs = cells.obs[measured.used]
    n_cells, n_genes = len(obs), cells.n_vars
    n_values = max(n_cells * n_genes, 1)
    n_above = int(measured.genes_per_cell.sum())
    symbols = cells.var["gene_symbol"].astype(str).where(cells.var["gene_symbol"].astype(str) != "", cells.var_names)
    order = np.argsort(-measured.variance, kind="stable")[:N_VARIABLE]
    mitochondrial = symbols.str.upper().str.startswith("MT-").to_numpy()
    all_counts = float(measured.total.sum())
    groups: dict[str, Any] = {}
    for column, kind in columns.items():
        values = obs[column].astype(str)
        table = pd.DataFrame(
            {"value": values.to_numpy(), "counts": measured.counts_per_cell, "genes": measured.genes_per_cell}
        )
        found = table.groupby("value", sort=True).agg(
            n_cells=("value", "size"), median_counts=("counts", "median"), median_genes=("genes", "median")
        )
        groups[column] = {
            "what": kind,
            "n_values": len(found),
            "values": {
                str(value): {
                    "n_cells": int(row["n_cells"]),
                    "share": float(row["n_cells"] / n_cells),
                    "median_counts": float(row["median_counts"]),
                    "median_genes": float(row["median_genes"]),
                }
                for value, row in found.iterrows()
            },
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "n_cells": n_cells,
        "n_genes": n_genes,
        "n_genes_with_counts": int((measured.n_cells > 0).sum()),
        "n_genes_with_id": int((cells.var["gene_id"].astype(str) != "").sum()),
        "n_cells_without_counts": int((measured.counts_per_cell == 0).sum()),
        "n_counts": all_counts,
        "largest_count": measured.largest,
        "share_of_zeros": 1.0 - n_above / n_values,
        "mean_count_above_zero": all_counts / n_above if n_above else None,
        "mitochondrial_share": float(measured.total[mitochondrial].sum() / all_counts) if all_counts else None,
        "counts_per_cell": _spread(measured.counts_per_cell),
        "genes_per_cell": _spread(measured.genes_per_cell),
        "cells_per_gene": _spread(measured.n_cells),
        "groups": groups,
        "most_variable_genes": [
            {
                "gene_id": str(cells.var["gene_id"].iloc[i]),
                "gene_symbol": str(symbols.iloc[i]),
                "variance": float(measured.variance[i]),
                "mean": float(measured.mean[i]),
                "share_of_cells": float(measured.n_cells[i] / n_cells),
            }
            for i in order
        ],
    }


def _spread(values: NDArray[Any]) -> dict[str, float]:
    found = {"mean": float(values.mean()), "standard_deviation": float(values.std())}
    return found | {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}


def group_columns(cells: AnnData, batch_key: str | tuple[str, ...] | None, levels: tuple[str, ...]) -> dict[str, str]:
    """Columns of `obs` to group by: the batch's and the labels' of a configuration, or else those of usual names that say something."""
    if batch_key is not None:
        batches = (batch_key,) if isinstance(batch_key, str) else batch_key
        return dict.fromkeys(batches, "batch") | dict.fromkeys(levels, "class")
    usual = {"dataset": "batch", "batch": "batch", "cell_type": "class"}
    return {
        name: kind for name, kind in usual.items() if name in cells.obs and cells.obs[name].astype(str).nunique() > 1
    }
