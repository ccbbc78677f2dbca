"""What a model has learned, gene by gene and set by set: impact on every latent unit and label, computed at export.

Guided back-propagation as in the expression-saliency autoencoder (Kinalis et al. 2019, doi:10.1186/s12859-019-2952-9), plain gradients,
and integrated gradients of the classes' own cells. docs/explain.md says what each number means and where this differs from the paper.
"""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.contract.gene_table import GeneTable
from service.contract.impact import ImpactTable
from service.contract.manifest import Impact
from training import gene_sets
from training.data.minibatches import Cells
from training.explanation import Explain, quantities
from training.families.family import Family
from training.run import Run

FILE = "reference/impact.npz"
N_CELLS, N_OF_CLASS = 512, 48
"""Training cells that impacts are means over, and cells of each class for what concerns a class; drawn at random."""

_STEPS = 32
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Softplus)


def build(run: Run, explain: nn.Module, genes: GeneTable) -> tuple[Impact, ImpactTable]:
    """The table of a run, and what the manifest says of it.

    Args:
        run: a finished run.
        explain: its module `explain`.
        genes: the model's.

    Raises:
        NoGeneSets: as `gene_sets.read` does.
    """
    assert isinstance(explain, Explain)
    wanted = run.config.export
    family, cells = run.family.eval(), run.prepared.train
    random = np.random.default_rng(run.config.seed)
    drawn = _draw(random, np.arange(len(cells)), N_CELLS)
    general = cells.take(drawn)
    impact, gradient = _impact(family, general)
    classes = _classes(family, cells, random)
    n_units = impact.shape[0] - len(classes)
    attribution, contrast = np.zeros((len(classes), len(genes))), np.zeros((len(classes), len(genes)))
    for i, (inside, outside) in enumerate(classes):
        if len(inside):
            attribution[i] = _attribution(explain, cells.take(inside), n_units + i)
        if len(inside) and len(outside):
            here, there = (_impact(family, cells.take(part), [n_units + i])[0][0] for part in (inside, outside))
            contrast[i] = here - there
    sets = gene_sets.read(wanted.gene_sets, genes, wanted.min_set_genes, wanted.max_set_genes)
    p, contrast_p = gene_sets.p_values(impact, sets.members), gene_sets.p_values(contrast, sets.members)
    table = ImpactTable(
        impact=impact.astype(np.float32),
        gradient=gradient.astype(np.float32),
        attribution=attribution.astype(np.float32),
        set_names=sets.names,
        set_sizes=np.array([len(members) for members in sets.members], dtype=np.int64),
        set_impact=gene_sets.medians(impact, sets.members).astype(np.float32),
        set_p=p.astype(np.float32),
        set_q=gene_sets.q_values(p).astype(np.float32),
        set_contrast=gene_sets.medians(contrast, sets.members).astype(np.float32),
        set_contrast_p=contrast_p.astype(np.float32),
        set_contrast_q=gene_sets.q_values(contrast_p).astype(np.float32),
    )
    about = Impact(
        file=FILE,
        n_cells=len(drawn),
        gene_sets=sets.files,
        min_set_genes=wanted.min_set_genes,
        max_set_genes=wanted.max_set_genes,
    )
    return about, table


def gradients(family: Family, counts: Tensor, chosen: list[int] | None = None) -> Iterator[Tensor]:
    """Gradient of one quantity after the other by each cell's transformed counts, (n, n_genes).

    Args:
        family: fitted, in evaluation mode.
        counts: raw, (n, n_genes).
        chosen: positions among latent units and log-odds; all by default.
    """
    values = family.transform(counts).detach().requires_grad_()
    found = quantities(family, values, counts)
    for i in range(found.shape[1]) if chosen is None else chosen:
        (gradient,) = torch.autograd.grad(found[:, i].sum(), values, retain_graph=True)
        yield gradient


@contextlib.contextmanager
def guided(family: Family) -> Iterator[None]:
    """Gradients within are guided back-propagation's: what goes back through an activation is clamped to be positive.

    Only activations that are modules are guided: all of them but those inside of TabNet, which has no use for it.
    """

    def clamp(module: nn.Module, inward: Any, outward: Any) -> Any:  # noqa: ARG001 - a hook's signature
        return tuple(None if gradient is None else gradient.clamp(min=0.0) for gradient in inward)

    handles = [
        module.register_full_backward_hook(clamp) for module in family.modules() if isinstance(module, _ACTIVATIONS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _impact(
    family: Family, cells: Cells, chosen: list[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over cells of the guided gradient's size, and of the plain gradient, each (n_quantities, n_genes)."""
    counts = _dense(cells)
    with guided(family):
        impact = [gradient.abs().double().mean(dim=0).numpy() for gradient in gradients(family, counts, chosen)]
    plain = [gradient.double().mean(dim=0).numpy() for gradient in gradients(family, counts, chosen)]
    return np.stack(impact), np.stack(plain)


def _attribution(explain: Explain, cells: Cells, quantity: int) -> NDArray[np.float64]:
    """Mean over cells of integrated gradients from an empty cell, as the task gives them, (n_genes,)."""
    counts, n = _dense(cells), len(cells)
    with torch.no_grad():
        width = quantities(explain.family, explain.family.transform(counts[:1]), counts[:1]).shape[1]
    direction = torch.eye(width)[quantity].expand(n, -1)
    total = np.zeros(counts.shape[1])
    for first, last in pairwise((i / _STEPS) ** 2 for i in range(_STEPS + 1)):
        found = explain(counts, direction, torch.full((n,), (first + last) / 2), torch.zeros(n))[0]
        total += (last - first) * found.double().mean(dim=0).numpy()
    return total


def _classes(
    family: Family, cells: Any, random: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For every class that `classify` knows: positions of some training cells of it, and of some others."""
    if "classify" not in family.graphs():
        return []
    found = []
    for i, n_classes in enumerate(family.dimensions.n_classes.values()):
        labels = cells.labels[:, i]
        for k in range(n_classes):
            inside, outside = np.flatnonzero(labels == k), np.flatnonzero((labels >= 0) & (labels != k))
            found.append((_draw(random, inside, N_OF_CLASS), _draw(random, outside, N_CELLS)))
    drawn = _draw(random, np.arange(len(cells)), N_CELLS)
    with torch.no_grad():
        counts = _dense(cells.take(drawn))
        values = family.transform(counts)
        scores = family.class_scores(values, family.encode_values(values, counts))
    # Levels of the family's own have no labels; there a cell is what it is taken for.
    for own in scores[len(family.dimensions.n_classes) :]:
        best = own.argmax(dim=1).numpy()
        found += [(drawn[best == k][:N_OF_CLASS], drawn[best != k]) for k in range(own.shape[1])]
    return found


def _draw(random: np.random.Generator, positions: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    return positions if len(positions) <= n else np.sort(random.choice(positions, n, replace=False))


def _dense(cells: Cells) -> Tensor:
    return torch.from_numpy(cells.counts.toarray())
