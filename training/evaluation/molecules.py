"""How well the molecules of a cell are foretold from other molecules of the same cell (Batson et al. 2019, doi:10.1101/786269)."""

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.minibatches import Cells
from training.evaluation.cells import decode, encode, minibatches
from training.families.family import Family

SHARE = 0.5
"""Of a cell's molecules that the encoder sees."""

FLOOR = 1e-6
"""Least expected share of a gene, one molecule in a million, so that a gene held for impossible costs much and not everything."""


def thin(counts: sp.csr_matrix, share: float, generator: np.random.Generator) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Two sets of molecules that add up to `counts`: each molecule falls into the first with probability `share`.

    If counts are Poisson, both sets are, and independent given the expression; that is what makes the second a test.
    """
    first = counts.copy()
    first.data = generator.binomial(counts.data.astype(np.int64), share).astype(counts.dtype)
    second = counts.copy()
    second.data = counts.data - first.data
    first.eliminate_zeros()
    second.eliminate_zeros()
    return first, second


def held_out_molecules(
    family: Family, cells: Cells, train: sp.csr_matrix, n_batches: int, seed: int
) -> dict[str, float]:
    """Molecular cross-validation: Poisson log-likelihood, in nats per molecule, of the molecules that the encoder did not see.

    The counts x of each cell are split binomially into x' and x'' = x - x'. With μ = decode(encode(x'), Σ_g x''_g, batch):

        score = Σ_cells Σ_g [x''_g ln μ_g - μ_g - ln Γ(x''_g + 1)] / Σ_cells Σ_g x''_g

    which is the Poisson loss of Batson, Royer & Webber 2019 (doi:10.1101/786269, eq. 2) with the sign turned and the constant kept. The
    trivial model's μ is (Σ_g x''_g) times each gene's share of all counts of the training cells: what one knows without seeing the cell.

    Args:
        family: the model.
        cells: that it was not trained on.
        train: raw counts of training cells, (n_cells, n_genes).
        n_batches: that the model knows.
        seed: of the thinning.

    Returns:
        `model`, `trivial` and `gain` = model - trivial, in nats per molecule; higher is better. `at_floor`: share of the molecules that
        the model expected less than FLOOR of. `n_cells`, `n_molecules`.
    """
    seen, unseen = thin(cells.counts, SHARE, np.random.default_rng(seed))
    library = np.asarray(unseen.sum(axis=1), dtype=np.float32).ravel()
    share = torch.from_numpy(np.asarray(train.sum(axis=0), dtype=np.float64).ravel())
    share = share / share.sum()
    latent = encode(family, seen)
    total = dict.fromkeys(("model", "trivial", "at_floor"), 0.0)
    for rows in minibatches(len(cells)):
        size = torch.from_numpy(library[rows])
        expected = decode(family, latent[rows], size, cells.batch[rows], n_batches).double()
        counts = torch.from_numpy(unseen[rows].toarray()).double()
        least = FLOOR * size.double()[:, None]
        total["model"] += float(poisson(counts, torch.maximum(expected, least)).sum())
        total["trivial"] += float(poisson(counts, torch.maximum(share * size.double()[:, None], least)).sum())
        total["at_floor"] += float(counts[expected < least].sum())
    n_molecules = float(library.sum(dtype=np.float64))
    found = {name: value / max(n_molecules, 1.0) for name, value in total.items()}
    return found | {"gain": found["model"] - found["trivial"], "n_cells": len(cells), "n_molecules": int(n_molecules)}


def poisson(counts: Tensor, mean: Tensor) -> Tensor:
    """Log-likelihood of counts in nats, of the same shape; certain where both are 0."""
    return torch.xlogy(counts, mean) - mean - torch.lgamma(counts + 1.0)


def library_sizes(counts: sp.csr_matrix) -> NDArray[np.float32]:
    """Counts per cell, float32 (n_cells,), at least 1."""
    return np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float32).ravel(), 1.0)
