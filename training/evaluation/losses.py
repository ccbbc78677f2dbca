"""The parts of a loss on cells that a model was and was not trained on: reconstruction and divergence are those of the evidence bound."""

import torch

from training import fit as fitting
from training.data.minibatches import Cells
from training.evaluation.cells import known_batches, minibatches
from training.families.family import Example, Family

RECONSTRUCTION = "reconstruction"
DIVERGENCES = ("divergence", "cluster_divergence")
"""Of the latent, and in a mixture of the components too."""


def loss_parts(family: Family, cells: Cells, n_batches: int, rows: int, seed: int) -> dict[str, float]:
    """Mean over cells of all parts that the family reports, in evaluation mode, uncorrupted, warm-up over.

    On the validation cells of the best model these are the figures of its epoch in metrics.csv: same draws, same minibatches.

    Args:
        family: the model.
        cells: any number above 0.
        n_batches: that it knows.
        rows: cells per minibatch. A part that compares the cells of a minibatch, as MMD does, depends on it and on the cells' order.
        seed: of the draws from the posterior.
    """
    family.eval()
    sums: dict[str, float] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for positions in minibatches(len(cells), rows):
            batch = cells.take(positions).minibatch()
            counts = batch.counts()
            # A family with a code for the average batch knows itself what to do with cells of no known one.
            knows = family.average_batch is not None
            variants = [batch.batch] if knows else known_batches(family, batch.batch.numpy(), n_batches)
            for variant in variants:
                example = Example(counts, counts, variant, batch.labels, fitting.VALIDATION_EPOCH, batch.obsm)
                for name, value in family.loss(example).items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(positions) / len(variants)
    return {name: total / len(cells) for name, total in sums.items()}


def evidence_bound(parts: dict[str, float]) -> float | None:
    """Lower bound of ln p(x) in nats per cell, divergences weighing 1 whatever they weighed in training; None for a family without them."""
    found = [parts[name] for name in DIVERGENCES if name in parts]
    return -(parts[RECONSTRUCTION] + sum(found)) if found and RECONSTRUCTION in parts else None
