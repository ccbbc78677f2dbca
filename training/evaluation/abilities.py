"""What some families can and others cannot: a likelihood, a prior, a mixture. Each is asked for here and nowhere else."""

from typing import Protocol, TypeGuard, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from training.families.family import Family


class Observing(Protocol):
    """A family with a likelihood (ObservingFamily in training/families/observing.py)."""

    average_batch: int | None

    def observed(self, counts: Tensor) -> Tensor:
        """What the likelihood explains of raw counts, (n, n_genes)."""

    def distribution(self, latent: Tensor, library: Tensor, batch: Tensor) -> Distribution:
        """Of what is observed, (n, n_genes)."""


def has_likelihood(family: Family) -> TypeGuard[Observing]:
    """Whether the family says how probable cells are."""
    return hasattr(family, "distribution")


def decodes_counts(family: Family) -> bool:
    """Whether `decode` gives expected counts; a likelihood of detection gives probabilities."""
    return getattr(family, "explains", "counts") != "detection"


def draw_latent(family: Family, n_cells: int, generator: torch.Generator) -> Tensor | None:
    """Draws from the family's prior, (n_cells, n_latent); None where it has none."""
    draw = getattr(family, "sample_latent", None)
    return None if draw is None else cast("Tensor | None", draw(n_cells, generator))


def cluster_probabilities(family: Family, counts: Tensor) -> Tensor | None:
    """Probability of each component of the family's mixture, (n_cells, n_components); None where it has none."""
    find = getattr(family, "clusters", None)
    return None if find is None else cast("Tensor | None", find(counts))
