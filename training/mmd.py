"""Maximum mean discrepancy between technical batches (Gretton et al. 2012, JMLR 13:723), with the kernel of trVAE."""

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
"""Of the sum of radial kernels exp(-d^2 / (2 b)), as in trVAE (Lotfollahi et al. 2020, doi:10.1093/bioinformatics/btaa800)."""


def kernel(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the radial kernels of BANDWIDTHS between rows, (n, m)."""
    distance = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.stack([torch.exp(-distance / (2.0 * bandwidth)) for bandwidth in BANDWIDTHS]).sum(dim=0)


def discrepancy(latent: Tensor, group: Tensor) -> Tensor:
    """Squared discrepancy averaged over all pairs of groups that have two cells or more; 0 where there is no pair.

    Args:
        latent: (n, n_latent).
        group: int64 (n,), negative for cells that belong to none.
    """
    values, n_cells = torch.unique(group[group >= 0], return_counts=True)
    members = [latent[group == value] for value in values[n_cells > 1]]
    within = [kernel(cells, cells).mean() for cells in members]
    return _mean(
        (
            within[i] + within[j] - 2.0 * kernel(members[i], members[j]).mean()
            for i, j in combinations(range(len(members)), 2)
        ),
        latent,
    )


def hierarchical_discrepancy(latent: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Discrepancy between the values of the first level, and of each further level within each combination of those above it, summed.

    Args:
        latent: (n, n_latent).
        levels: for each level, coarsest first, int64 (n,), negative for cells that belong to none.
    """
    total = latent.new_zeros(())
    parent = torch.zeros_like(levels[0])
    for level in levels:
        parts = torch.unique(parent[parent >= 0])
        total = total + _mean((discrepancy(latent, level.masked_fill(parent != part, -1)) for part in parts), latent)
        parent = (parent * (int(level.max()) + 2) + level).masked_fill((parent < 0) | (level < 0), -1)
    return total


def _mean(values: Iterable[Tensor], like: Tensor) -> Tensor:
    found = list(values)
    return torch.stack(found).mean() if found else like.new_zeros(())
