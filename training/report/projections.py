"""The latent in two dimensions: PCA, UMAP, t-SNE and ICA, the same for the same cells."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA, FastICA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

METHODS = ("PCA", "UMAP", "t-SNE", "ICA")
MIN_CELLS = 10
"""Fewer have no neighbours to speak of."""

SEED = 0


class TooFewCells(Exception):
    """There are too few cells, or too few directions in them, for a plane."""


def project(latent: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """Coordinates (n, 2) by method.

    Args:
        latent: (n, n_latent).

    Raises:
        TooFewCells: fewer than MIN_CELLS, a latent that is not finite or has a single direction.
    """
    values = np.asarray(latent, dtype=np.float64)
    n_cells = len(values)
    if n_cells < MIN_CELLS:
        raise TooFewCells(f"{n_cells} cells are too few to show the latent; {MIN_CELLS} are needed.")
    if not np.isfinite(values).all():
        raise TooFewCells("The latent holds values that are not finite, so it is not shown.")
    values = values - values.mean(axis=0)
    rank = int(np.linalg.matrix_rank(values))
    if rank < 2:
        raise TooFewCells(
            f"The latent of {n_cells:,} cells has {rank} directions in which cells differ; two are needed."
        )
    with one_thread(), warnings.catch_warnings():
        # umap warns of an absent TensorFlow and that a seed means one thread, and FastICA of slow convergence, which a picture survives.
        warnings.simplefilter("ignore")
        from umap import UMAP  # takes seconds, which other commands need not wait for

        reduced = PCA(rank, svd_solver="full").fit_transform(values)
        return {
            "PCA": reduced[:, :2],
            "UMAP": np.asarray(
                UMAP(n_neighbors=min(15, n_cells - 1), random_state=SEED, n_jobs=1).fit_transform(values),
                dtype=np.float64,
            ),
            "t-SNE": np.asarray(
                TSNE(init="pca", perplexity=min(30.0, (n_cells - 1) / 3), random_state=SEED, n_jobs=1).fit_transform(
                    values
                ),
                dtype=np.float64,
            ),
            "ICA": FastICA(2, whiten="unit-variance", random_state=SEED, max_iter=1000).fit_transform(reduced),
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for whatever adds numbers up: another number gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
