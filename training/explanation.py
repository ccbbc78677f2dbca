"""The graph `explain`: what each gene of a cell adds to a latent unit, to a label, or to a direction in latent space.

It holds a gradient, not an approximation of one: autograd is traced once and written out as operators, for every family alike.
docs/explain.md has the equations.
"""

import numpy as np
import torch
from torch import Tensor, nn

from training.data.prepared import Prepared
from training.families.family import Family, Graph
from training.parity import Arrays, run_torch

NAME = "explain"
INPUTS, OUTPUTS = ("counts", "direction", "position", "baseline"), ("attribution", "value")
_ROWS = 1024
_POSITIONS = (1.0, 0.75, 0.5, 0.9, 0.3, 0.6, 0.15, 0.45)
_NUDGE = 1e-5


class Explain(nn.Module):
    """counts (n, n_genes), direction (n, n_latent + n_classes), position (n,), baseline (n,) → attribution (n, n_genes), value (n,)."""

    def __init__(self, family: Family, profile: Tensor) -> None:
        """Build the module.

        Args:
            family: fitted, in evaluation mode.
            profile: mean of the training cells' transformed counts, (n_genes,).
        """
        super().__init__()
        self.family = family
        with torch.no_grad():
            empty = family.transform(torch.zeros(1, len(profile)))[0]
        self.register_buffer("empty", empty.clone())
        self.register_buffer("difference", profile - empty)

    def forward(self, counts: Tensor, direction: Tensor, position: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        """Input times gradient at a place on the straight path from a baseline to the cell, both in transformed counts.

        Args:
            counts: raw.
            direction: weights of what is explained: first the latent's units, then the log-odds of each class, level by level.
            position: 0 at the baseline, 1 at the cell.
            baseline: 0 for an empty cell, 1 for the mean of the reference's cells.

        Returns:
            Per gene, difference of the transformed count from the baseline's times the gradient at that place; and what is explained
            there. The depth is the cell's own all along the path, where an encoder knows it beside its input.
        """
        start = self.empty + baseline.unsqueeze(1) * self.difference
        change = self.family.transform(counts) - start
        with torch.enable_grad():
            values = (start + position.unsqueeze(1) * change).detach().requires_grad_()
            value = (quantities(self.family, values, counts) * direction).sum(dim=1)
            (gradient,) = torch.autograd.grad(value.sum(), values)
        return change * gradient, value.detach()


def quantities(family: Family, values: Tensor, counts: Tensor) -> Tensor:
    """What can be explained of cells: latent and log-odds of every class, (n, n_latent + n_classes).

    Args:
        family: fitted.
        values: transformed counts, (n, n_genes).
        counts: raw, (n, n_genes).
    """
    latent = family.encode_values(values, counts)
    return torch.cat([latent, *map(log_odds, family.class_scores(values, latent))], dim=1)


def log_odds(scores: Tensor) -> Tensor:
    """Of each class against all others, (n, n_classes), from logarithms of probabilities up to a constant."""
    n_classes = scores.shape[1]
    if n_classes == 1:
        return scores
    itself = torch.eye(n_classes, dtype=torch.bool, device=scores.device)
    others = scores.unsqueeze(1).masked_fill(itself, float("-inf"))
    return scores - torch.logsumexp(others, dim=2)


def graph(family: Family, prepared: Prepared) -> Graph:
    """The graph of a fitted family."""
    return Graph(Explain(family.eval(), mean_profile(family, prepared)), INPUTS, OUTPUTS, takes_gradient=True)


def mean_profile(family: Family, prepared: Prepared) -> Tensor:
    """Mean of the training cells' transformed counts, (n_genes,)."""
    n_cells, total = len(prepared.train), torch.zeros(prepared.dimensions.n_genes, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, n_cells, _ROWS):
            counts = prepared.train.take(np.arange(start, min(start + _ROWS, n_cells))).counts
            total += family.transform(torch.from_numpy(counts.toarray())).double().sum(dim=0)
    return (total / n_cells).float()


def example_inputs(wanted: Graph, inputs: Arrays) -> Arrays:
    """Inputs of the graph beside counts with which two runtimes can be compared: every quantity in turn, from both baselines.

    A gradient jumps where a unit is just between on and off, and there float32 may see the other side. Each cell is therefore explained
    at that one of a few places on its path around which the gradient changes least.
    """
    assert isinstance(wanted.module, Explain)
    counts = inputs["counts"].astype(np.float32)
    n_cells = len(counts)
    with torch.no_grad():
        one = torch.from_numpy(counts[:1])
        n_quantities = quantities(wanted.module.family, wanted.module.family.transform(one), one).shape[1]
    given: Arrays = {
        "counts": counts,
        "direction": np.eye(n_quantities, dtype=np.float32)[np.arange(n_cells) % n_quantities],
        "baseline": (np.arange(n_cells) % 2).astype(np.float32),
    }

    def attribution(position: float) -> np.ndarray:
        at = {"position": np.full(n_cells, position, dtype=np.float64)}
        return run_torch({NAME: wanted}, {**given, **at})[f"{NAME}/attribution"]

    changes = [
        np.abs(attribution(position * (1 + _NUDGE)) - attribution(position * (1 - _NUDGE))).max(axis=1)
        for position in _POSITIONS
    ]
    chosen = np.array(_POSITIONS, dtype=np.float32)[np.argmin(changes, axis=0)]
    return {name: array for name, array in given.items() if name != "counts"} | {"position": chosen}
