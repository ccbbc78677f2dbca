"""Some cells of a run, and what its model makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from training.data.prepared import column, encode_obs
from training.data.splits import PUBLISHED, TEST, TRAIN, VALIDATION
from training.data.stored_cells import read_rows
from training.families.family import Family
from training.run import Run

_ROWS = 512
"""Cells that the network sees at once."""

Names = NDArray[np.object_]


@dataclass(frozen=True)
class Sample:
    """Cells with the network's answers; rows agree between the fields."""

    part: str
    """Which cells they are, in words."""

    n_all: int
    """Cells that they were drawn from."""

    counts: sp.csr_matrix
    """Raw counts over the model's genes, (n, n_genes)."""

    latent: NDArray[np.float32]
    expected: NDArray[np.float32]
    """Reconstructed counts as the cell's own batch, or as the average one where the model has not seen that; (n, n_genes)."""

    batch: Names
    labels: Mapping[str, Names]
    """Class by level; "" where it is not known or not one of the model's."""

    probabilities: Mapping[str, NDArray[np.float32]]
    """By level of the graph `classify`, (n, n_classes); a level without labels is a clustering of the model's own."""

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def says(self) -> str:
        """How many of how many."""
        return (
            f"{len(self):,} of {self.n_all:,} {self.part}" if len(self) < self.n_all else f"{self.n_all:,} {self.part}"
        )


def draw_all(run: Run, n_cells: int, seed: int = 0) -> Sample:
    """At most `n_cells` of all parts of the split, drawn at random."""
    return _draw(run, "cells of all parts of the split", (TRAIN, VALIDATION, TEST, PUBLISHED), n_cells, seed)


def draw_unseen(run: Run, n_cells: int, seed: int = 0) -> Sample:
    """At most `n_cells` test cells, drawn at random; validation cells where the split has no others, training cells where it has neither."""
    if len(run.split.positions(run.reference, TEST)):
        return _draw(run, "test cells", (TEST,), n_cells, seed)
    if len(run.split.positions(run.reference, VALIDATION)):
        return _draw(run, "validation cells (the split has no test cells)", (VALIDATION,), n_cells, seed)
    return _draw(run, "training cells (the split has no others, so figures are too good)", (TRAIN,), n_cells, seed)


def _draw(run: Run, part: str, parts: tuple[str, ...], n_cells: int, seed: int) -> Sample:
    positions = np.sort(run.split.positions(run.reference, *parts))
    n_all = len(positions)
    if n_all > n_cells:
        positions = np.sort(np.random.default_rng(seed).choice(positions, n_cells, replace=False))
    reference, config, prepared = run.reference, run.config, run.prepared
    cells = reference[positions]
    genes = reference.var_names.get_indexer(prepared.var.index)
    if sp.issparse(reference.X):
        counts = sp.csr_matrix(cells.X[:, genes], dtype=np.float32)
    else:
        rows = read_rows(reference.X, positions, config.datasets[0], reference.obs_names, reference.var_names)
        counts = rows[:, genes]
    batch, codes = encode_obs(config, cells, prepared.batches)
    labels = {}
    for i, level in enumerate(config.labels):
        names = np.array([*level.classes, ""], dtype=object)
        labels[level.name] = names[codes[:, i]]
    latent, expected, probabilities = answers(run.family, counts, batch, len(prepared.batches))
    return Sample(
        part, n_all, counts, latent, expected, column(cells, config.batch_key).to_numpy(object), labels, probabilities
    )


def answers(
    family: Family, counts: sp.csr_matrix, batch: NDArray[np.int64], n_batches: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """Latent, reconstructed counts and class probabilities by level, from the modules that are exported.

    Args:
        family: in evaluation mode.
        counts: raw counts (n, n_genes).
        batch: number of each cell's technical batch, -1 for one that the model has not seen.
        n_batches: that it has seen.
    """
    graphs = family.graphs()
    classes = (
        [name.removeprefix("probabilities_") for name in graphs["classify"].outputs] if "classify" in graphs else []
    )
    latents, expecteds = [], []
    probabilities: dict[str, list[NDArray[np.float32]]] = {name: [] for name in classes}
    with torch.no_grad():
        for start in range(0, counts.shape[0], _ROWS):
            block = torch.from_numpy(counts[start : start + _ROWS].toarray())
            known = {"counts": block, "latent": graphs["encode"].module(block), "library": block.sum(dim=1)}
            own = torch.from_numpy(batch[start : start + _ROWS])
            latents.append(known["latent"].numpy())
            expecteds.append(_decode(family, known["latent"], known["library"], own, n_batches).numpy())
            if classes:
                found = graphs["classify"].module(*(known[name] for name in graphs["classify"].inputs))
                for name, values in zip(classes, found, strict=True):
                    probabilities[name].append(values.numpy())
    levels = {name: np.concatenate(values) for name, values in probabilities.items()}
    return np.concatenate(latents), np.concatenate(expecteds), levels


def _decode(
    family: Family, latent: torch.Tensor, library: torch.Tensor, batch: torch.Tensor, n_batches: int
) -> torch.Tensor:
    """Expression, as the average batch where the own one is -1: the mean over batches where the family has no code for it."""
    module = family.graphs()["decode"].module

    def expression(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        answer = module(latent[rows], library[rows], codes)
        return answer[0] if isinstance(answer, tuple) else answer

    known, unseen = torch.nonzero(batch >= 0).ravel(), torch.nonzero(batch < 0).ravel()
    codes = range(n_batches) if family.average_batch is None else [family.average_batch]
    result = None
    for rows, choices in ((known, [batch[known]]), (unseen, [torch.full_like(unseen, code) for code in codes])):
        if len(rows):
            found = torch.stack([expression(rows, choice) for choice in choices]).mean(dim=0)
            result = found.new_zeros(len(latent), found.shape[1]) if result is None else result
            result[rows] = found
    assert result is not None  # the caller has a cell at least
    return result
