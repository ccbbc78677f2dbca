"""The cells that figures are computed on, and how a family is led over them in minibatches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.minibatches import Cells
from training.data.prepared import column, encode_cells, encode_obs, encode_obsm
from training.data.splits import TEST, TRAIN, VALIDATION
from training.data.stored_cells import read_rows
from training.families.family import Family
from training.run import Run

PARTS = (TRAIN, VALIDATION, TEST)
_ROWS = 1024


@dataclass(frozen=True)
class Sample:
    """Cells of a run, in memory."""

    cells: Cells
    labels: dict[str, NDArray[np.int64]]
    """Class of each cell by label level, -1 for none; figures against labels need no classifier."""

    n_all: int
    """Cells that these were drawn from."""

    def __len__(self) -> int:
        return len(self.cells)


def draw(run: Run, parts: tuple[str, ...], max_cells: int, columns: tuple[str, ...] = ()) -> Sample:
    """The cells of some parts of the split, or a random sample of them that follows from the run's seed.

    Args:
        run: a finished run.
        parts: of the split.
        max_cells: more are not read.
        columns: of `obs`, to be taken for label levels beside those of the configuration.

    Raises:
        UnknownColumn: no such column.
    """
    everything = run.split.positions(run.reference, *parts)
    positions = everything
    if len(positions) > max_cells:
        positions = np.sort(np.random.default_rng(run.config.seed).choice(everything, max_cells, replace=False))
    cells = read(run, positions)
    labels = {level.name: cells.labels[:, i] for i, level in enumerate(run.config.labels)}
    for name in columns:
        values = column(run.reference, name).replace({"": None, "nan": None})
        labels[name] = pd.factorize(values, sort=True)[0].astype(np.int64)[positions]
    return Sample(cells, labels, len(everything))


def read(run: Run, positions: NDArray[np.int64]) -> Cells:
    """The cells of a run at ascending `positions` over the model's genes, in memory."""
    prepared, reference = run.prepared, run.reference
    genes = reference.var_names.get_indexer(prepared.var.index)
    part = reference[positions]
    if sp.issparse(reference.X):
        return encode_cells(run.config, part, genes, prepared.batches, prepared.dimensions.obsm)
    name = ", ".join(run.config.datasets)
    counts = read_rows(reference.X, positions, name, reference.obs_names, reference.var_names)[:, genes]
    batch, labels = encode_obs(run.config, part, prepared.batches)
    return Cells(counts, batch, labels, part.obs_names.to_numpy(), encode_obsm(part, prepared.dimensions.obsm))


def minibatches(n_cells: int, rows: int = _ROWS) -> Iterator[NDArray[np.int64]]:
    """Positions of one minibatch after the other."""
    for start in range(0, n_cells, rows):
        yield np.arange(start, min(start + rows, n_cells))


def dense(counts: sp.csr_matrix) -> Tensor:
    """Raw counts as families take them, float32 (n_cells, n_genes)."""
    return torch.from_numpy(counts.toarray().astype(np.float32, copy=False))


def encode(family: Family, counts: sp.csr_matrix) -> Tensor:
    """Latent (n_cells, n_latent) as it is served: the point estimate."""
    module = family.eval().graphs()["encode"].module
    with torch.no_grad():
        return torch.cat([module(dense(counts[rows])) for rows in minibatches(counts.shape[0])])


def known_batches(family: Family, batch: NDArray[np.int64], n_batches: int) -> list[Tensor]:
    """Batches to decode as, int64 (n_cells,): the cells' own; those of a batch that was not trained on (-1) get the average one.

    A family without a code for the average batch is asked once for each batch that it knows, and the answers are averaged.
    """
    own = torch.from_numpy(batch)
    unknown = own < 0
    if not bool(unknown.any()):
        return [own]
    if family.average_batch is not None:
        return [own.masked_fill(unknown, family.average_batch)]
    return [own.masked_fill(unknown, number) for number in range(n_batches)]


def decode(family: Family, latent: Tensor, library: Tensor, batch: NDArray[np.int64], n_batches: int) -> Tensor:
    """Expected counts (n_cells, n_genes) of cells with `library` counts."""
    module = family.eval().graphs()["decode"].module
    with torch.no_grad():
        found = [module(latent, library, one) for one in known_batches(family, batch, n_batches)]
    # A family of several modalities gives the genes first.
    return torch.stack([one[0] if isinstance(one, tuple) else one for one in found]).mean(dim=0)
