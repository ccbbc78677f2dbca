"""Batches mixed and labels kept apart, by the metrics of scib (Luecken et al. 2022, doi:10.1038/s41592-021-01336-8)."""

import importlib.util
import logging
import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from training.data.minibatches import Cells
from training.evaluation.annotation import log_normalise

N_NEIGHBOURS = 90
"""The largest neighbourhood that scib-metrics looks at."""

N_COMPONENTS = 50
"""Of the principal components that the mixing of batches is compared with."""


def integration(
    latent: NDArray[np.float32], cells: Cells, labels: NDArray[np.int64] | None, seed: int
) -> dict[str, float | int | str | None]:
    """Figures of scib-metrics for a latent: of batch correction, and with labels of what became of them; all 0 to 1, higher is better.

    Args:
        latent: point estimates, (n_cells, n_latent).
        cells: the same ones; those of a batch that was not trained on do not count.
        labels: class of each, -1 for none; such cells do not count. None: only what needs no labels.
        seed: of the principal components.

    Returns:
        The metrics by scib-metrics' names, with `Batch correction`, `Bio conservation` and `Total` as it weighs them; `n_cells`,
        `n_batches`. A metric that is not defined for these cells is None. Or only `skipped`, a sentence that says why.
    """
    used = cells.batch >= 0
    if labels is not None:
        used &= labels >= 0
    batch = cells.batch[used]
    n_batches, n_cells = len(np.unique(batch)), int(used.sum())
    if n_batches < 2:
        return {"skipped": "The cells are of fewer than two batches."}
    if n_cells <= N_NEIGHBOURS:
        return {"skipped": f"{n_cells} cells are too few: the metrics look at {N_NEIGHBOURS} neighbours of each."}
    if importlib.util.find_spec("scib_metrics") is None:
        return {
            "skipped": "scib-metrics is not installed. `pip install scib-metrics` (it is in the train extra) to see how batches mix."
        }
    values = log_normalise(cells.counts[used])
    n_components = min(N_COMPONENTS, min(values.shape) - 1)
    # arpack centres in passing; a sparse matrix that was centred itself would be dense.
    before = PCA(n_components, svd_solver="arpack", random_state=seed).fit_transform(values)
    points = np.ascontiguousarray(latent[used])
    with warnings.catch_warnings():
        # Of jax, pandas and anndata beneath scib-metrics, and of its metrics for classes of few cells.
        warnings.simplefilter("ignore")
        known = None if labels is None else labels[used]
        figures = (
            _without_labels(points, before, batch) if known is None else _with_labels(points, before, batch, known)
        )
    numbers = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {"n_cells": n_cells, "n_batches": n_batches, **numbers}


def _neighbours(points: NDArray[Any], n_neighbours: int) -> Any:
    """Exact ones, a cell itself first: for some thousand cells they are quicker than approximate ones, and the same each time."""
    from scib_metrics.nearest_neighbors import NeighborsResults

    distances, indices = NearestNeighbors(n_neighbors=n_neighbours).fit(points).kneighbors(points)
    return NeighborsResults(indices=indices, distances=distances)


def _with_labels(
    points: NDArray[Any], before: NDArray[Any], batch: NDArray[np.int64], labels: NDArray[np.int64]
) -> dict[str, float]:
    from scib_metrics.benchmark import Benchmarker

    obs = pd.DataFrame({"batch": batch.astype(str), "label": labels.astype(str)}).astype("category")
    obs.index = obs.index.astype(str)
    cells = AnnData(points, obs=obs, obsm={"latent": points, "before": before})
    # It tells of each class that is of one batch only.
    logging.getLogger("scib_metrics").setLevel(logging.WARNING)
    benchmark = Benchmarker(
        cells, "batch", "label", ["latent"], pre_integrated_embedding_obsm_key="before", progress_bar=False
    )
    benchmark.prepare(_neighbours)
    benchmark.benchmark()
    return {str(name): float(value) for name, value in benchmark.get_results().loc["latent"].items()}


def _without_labels(points: NDArray[Any], before: NDArray[Any], batch: NDArray[np.int64]) -> dict[str, float]:
    import scib_metrics

    mixing = scib_metrics.ilisi_knn(_neighbours(points, N_NEIGHBOURS), batch)
    comparison = scib_metrics.pcr_comparison(before, points, batch, categorical=True)
    return {"iLISI": float(mixing), "PCR comparison": float(comparison)}
