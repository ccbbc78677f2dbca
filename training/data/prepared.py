"""From a reference and a split to what a family is fitted on."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray

from training.config import Config
from training.data.features import TrainingCells, select_genes
from training.data.minibatches import Cells
from training.data.splits import TRAIN, VALIDATION, Split, split_cells
from training.families.family import Dimensions, Statistics


@dataclass(frozen=True)
class Prepared:
    """Training and validation cells over the chosen genes."""

    train: Cells
    validation: Cells
    var: pd.DataFrame
    """The chosen genes: gene_id and gene_symbol, in graph order."""

    dimensions: Dimensions
    statistics: Statistics


def split_reference(config: Config, reference: AnnData) -> Split:
    """The split of a run: every data set and class is drawn from alike."""
    labels = [reference.obs[level.name].astype(str) for level in config.labels[:1]]
    strata = zip(reference.obs["dataset"], *labels, strict=True)
    return split_cells(reference, strata, config.split.test, config.split.validation, config.seed)


def encode_cells(config: Config, cells: AnnData, genes: NDArray[np.int64]) -> Cells:
    """Counts over `genes` (positions in `cells`), batches and labels as numbers.

    Batches are numbered in the order of `config.data`; a cell of another set has -1 and can only be encoded.
    """
    batch = pd.Categorical(cells.obs["dataset"], categories=list(config.data)).codes.astype(np.int64)
    codes = [
        pd.Categorical(cells.obs[level.name].astype(str), categories=list(level.classes)).codes.astype(np.int64)
        for level in config.labels
    ]
    labels = np.stack(codes, axis=1) if codes else np.zeros((cells.n_obs, 0), dtype=np.int64)
    return Cells(sp.csr_matrix(cells.X[:, genes], dtype=np.float32), batch, labels)


def prepare(config: Config, reference: AnnData, split: Split) -> Prepared:
    """Choose genes from the training cells and put both parts into numbers."""
    positions = split.positions(reference, TRAIN)
    everything = encode_cells(config, reference[positions], np.arange(reference.n_vars))
    first = everything.labels[:, 0] if everything.labels.shape[1] else np.full(len(positions), -1)
    chosen = select_genes(
        TrainingCells(everything.counts, everything.batch, first),
        config.genes.rule,
        config.genes.n_genes,
        config.genes.min_cells,
    )
    train = Cells(everything.counts[:, chosen], everything.batch, everything.labels)
    validation = encode_cells(config, reference[split.positions(reference, VALIDATION)], chosen)
    return Prepared(
        train=train,
        validation=validation,
        var=reference.var.iloc[chosen].copy(),
        dimensions=Dimensions(
            n_genes=len(chosen),
            n_batches=len(config.data),
            n_classes={level.name: len(level.classes) for level in config.labels},
        ),
        statistics=measure(config, train),
    )


def measure(config: Config, train: Cells) -> Statistics:
    """Mean and deviation of each gene's ln(1 + counts per target_sum), and the number of cells of each class."""
    library = np.maximum(np.asarray(train.counts.sum(axis=1), dtype=np.float64), 1.0)
    values = sp.csr_matrix(train.counts.multiply(config.hyperparameters.target_sum / library)).log1p()
    mean = np.asarray(values.mean(axis=0)).ravel()
    variance = np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2
    std = np.sqrt(np.where(variance > 1e-12, variance, 1.0))
    n_cells = {}
    for i, level in enumerate(config.labels):
        labels = train.labels[:, i]
        n_cells[level.name] = torch.from_numpy(np.bincount(labels[labels >= 0], minlength=len(level.classes))).float()
    return Statistics(torch.from_numpy(mean).float(), torch.from_numpy(std).float(), n_cells)
