"""From a reference and a split to what a family is fitted on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray

from training.config import Config, Level
from training.data.features import BY_NAME, TrainingCells, select_genes, select_named
from training.data.minibatches import Cells
from training.data.splits import HELD_OUT, SEQUENTIAL, STRATIFIED, TRAIN, VALIDATION, Split, hold_out, split_cells
from training.data.stored_cells import StoredCells, read_rows, store
from training.families import FAMILIES
from training.families.family import BatchLevel, Dimensions, Statistics

IS_USED = "is_used"
"""Column of `obs` of cells on disk: whether they passed the cell filter. The others have no part in a split."""

_MEASURED = 65_536
"""Cells that are measured together; of a larger number the sums depend on it in the last bit."""


@dataclass(frozen=True)
class Prepared:
    """Training and validation cells over the chosen genes."""

    train: Cells | StoredCells
    validation: Cells | StoredCells
    var: pd.DataFrame
    """The chosen genes: gene_id and gene_symbol, in graph order."""

    batches: tuple[str, ...]
    """Technical batches, by their number."""

    dimensions: Dimensions
    statistics: Statistics


class NoTrainingCells(Exception):
    """The split leaves nothing to train on, or to validate with."""


class LabelsContradict(Exception):
    """A cell's class of one level does not belong to its class of the level above."""


class UnknownColumn(Exception):
    """The configuration names a column that the cells do not have."""


def split_reference(config: Config, reference: AnnData) -> Split:
    """The split of a run, as the configuration's `split` asks for it.

    Raises:
        UnknownColumn: no such label or batch.
        UnknownBatch: a batch that is to be held out does not occur.
    """
    wanted = config.split
    if IS_USED in reference.obs:
        reference = reference[reference.obs[IS_USED].to_numpy()]
    batch = column(reference, config.batch_key)
    # Rare classes must be in every part, so that a draw by batch is stratified as well.
    levels = config.labels[:1] if wanted.method in (STRATIFIED, HELD_OUT) else ()
    strata = zip(reference.obs["dataset"], *(column(reference, level.name) for level in levels), strict=True)
    if wanted.method == HELD_OUT:
        return hold_out(reference, batch, wanted.held_out, strata, wanted.validation, config.seed, wanted.calibration)
    assert isinstance(wanted.calibration, float), "the configuration refuses names without held_out"
    return split_cells(
        reference,
        strata,
        wanted.test,
        wanted.validation,
        config.seed,
        is_sequential=wanted.method == SEQUENTIAL,
        calibration=wanted.calibration,
    )


LEVEL_SEPARATOR = " | "
"""Between the parts of the name of a batch of several levels."""


def column(cells: AnnData, key: str | tuple[str, ...]) -> pd.Series:
    """A column of `obs` as strings, or several, joined by LEVEL_SEPARATOR.

    Raises:
        UnknownColumn: with the columns that there are.
    """
    if isinstance(key, tuple):
        columns = [column(cells, name) for name in key]
        joined = [LEVEL_SEPARATOR.join(values) for values in zip(*columns, strict=True)]
        return pd.Series(joined, index=cells.obs_names, dtype=object)
    if key not in cells.obs:
        raise UnknownColumn(
            f"The cells have no column '{key}' in obs. They have {', '.join(map(str, cells.obs.columns))}."
        )
    return cells.obs[key].astype(str)


def batch_names(config: Config, training_cells: AnnData) -> tuple[str, ...]:
    """Technical batches that have training cells: data sets in the configuration's order, others by name.

    Those of a run that this one begins with come first, with cells or without.
    """
    found = set(column(training_cells, config.batch_key))
    known = config.start.batches if config.start else ()
    names = config.datasets if config.batch_key == "dataset" else tuple(sorted(found))
    return (*known, *(name for name in names if name in found and name not in known))


def add_labels(config: Config, reference: AnnData) -> None:
    """Write each label level that has a column of its own, or that only some data sets have, to the column of its name.

    A cell without a class of a level gets the parent of its class of the level below, where it has one.

    Raises:
        LabelsContradict: a cell has a class of the level above that is not the parent of its class.
    """
    for level in config.labels:
        if config.start and (level.column or level.name) not in reference.obs:
            # A query without labels: what is known of classes comes with the weights.
            reference.obs[level.name] = ""
        elif level.column or level.data or level.values:
            values = column(reference, level.column or level.name).replace(level.values)
            has_level = reference.obs["dataset"].isin(level.data or config.datasets)
            reference.obs[level.name] = values.where(has_level, "")
    for level in reversed(config.labels):
        if level.parent is not None:
            _fill_parents(reference, level)


def _fill_parents(reference: AnnData, level: Level) -> None:
    own = column(reference, level.name)
    above = column(reference, str(level.parent))
    parent = own.map(level.parents)
    classes = set(level.parents.values())
    contradicts = parent.notna() & above.isin(classes) & (above != parent)
    if contradicts.any():
        cell = contradicts.idxmax()
        raise LabelsContradict(
            f"{int(contradicts.sum()):,} cells, first '{cell}', are '{above[cell]}' ({level.parent}) and '{own[cell]}' ({level.name}), which "
            f"the configuration puts below '{parent[cell]}'."
        )
    reference.obs[str(level.parent)] = above.where(parent.isna() | above.isin(classes), parent)


def batch_levels(config: Config, batches: tuple[str, ...]) -> tuple[BatchLevel, ...]:
    """The columns that the batches are combinations of, with the value that each batch has in them."""
    if isinstance(config.batch_key, str):
        return (BatchLevel(config.batch_key, batches, tuple(range(len(batches)))),)
    values = list(zip(*(batch.split(LEVEL_SEPARATOR) for batch in batches), strict=True))
    levels = []
    for name, found in zip(config.batch_key, values, strict=True):
        known = tuple(dict.fromkeys(found))
        levels.append(BatchLevel(name, known, tuple(known.index(value) for value in found)))
    return tuple(levels)


def obsm_names(config: Config, reference: AnnData) -> dict[str, tuple[str, ...]]:
    """Names of the columns of what the family needs beside counts, by key of `obsm`; numbers where they have none.

    Raises:
        UnknownColumn: with the keys that there are.
    """
    names = {}
    for key in FAMILIES[config.family].obsm_keys(config.hyperparameters):
        if key not in reference.obsm:
            raise UnknownColumn(
                f"The family {config.family} needs obsm['{key}'], which the cells do not have. They have "
                f"{', '.join(reference.obsm) or 'none'}."
            )
        values = reference.obsm[key]
        names[key] = tuple(map(str, values.columns if isinstance(values, pd.DataFrame) else range(values.shape[1])))
    return names


def encode_obsm(cells: AnnData, names: Mapping[str, tuple[str, ...]]) -> dict[str, NDArray[np.float32]]:
    """What a family needs beside counts, its columns matched by name; NaN for what the cells lack."""
    found = {}
    for key, columns in names.items():
        values = cells.obsm.get(key, pd.DataFrame(index=cells.obs_names))
        if isinstance(values, pd.DataFrame):
            values = values.rename(columns=str).reindex(columns=list(columns))
        found[key] = np.asarray(values.toarray() if sp.issparse(values) else values, dtype=np.float32)
    return found


def encode_obs(
    config: Config, cells: AnnData, batches: tuple[str, ...] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Batch (n_cells,) and labels (n_cells, n_levels) as numbers, -1 for what the model does not know; see `encode_cells`."""
    names = config.datasets if batches is None else batches
    batch = pd.Categorical(column(cells, config.batch_key), categories=list(names)).codes.astype(np.int64)
    codes = [
        pd.Categorical(column(cells, level.name), categories=list(level.classes)).codes.astype(np.int64)
        for level in config.labels
    ]
    return batch, np.stack(codes, axis=1) if codes else np.zeros((cells.n_obs, 0), dtype=np.int64)


def encode_cells(
    config: Config,
    cells: AnnData,
    genes: NDArray[np.int64],
    batches: tuple[str, ...] | None = None,
    obsm: Mapping[str, tuple[str, ...]] | None = None,
) -> Cells:
    """Counts over `genes` (positions in `cells`), batches and labels as numbers.

    Args:
        config: names the columns.
        cells: of the run's data sets, or others with the same genes.
        genes: positions in `cells`, in graph order.
        batches: of the model (`Prepared.batches`), None for the names of the data sets. A cell of another batch has -1 and can only be
            encoded.
        obsm: names of columns by key of `obsm`, for what the family needs beside counts.
    """
    batch, labels = encode_obs(config, cells, batches)
    counts = sp.csr_matrix(cells.X[:, genes], dtype=np.float32)
    return Cells(counts, batch, labels, cells.obs_names.to_numpy(dtype=object), encode_obsm(cells, obsm or {}))


def prepare(
    config: Config,
    reference: AnnData,
    split: Split,
    scratch: Path | None = None,
    genes: NDArray[np.int64] | None = None,
) -> Prepared:
    """Choose genes from the training cells and put both parts into numbers.

    Args:
        config: what is wanted.
        reference: the cells; where its counts lie on disk, those of the chosen genes are copied to a temporary file.
        split: part of each cell.
        scratch: existing directory for that file; None for the system's.
        genes: positions in `reference`, in graph order, where they are chosen already.

    Raises:
        NoTrainingCells: there are none.
        NoGenes: no gene passes the filters, or one that is asked for is not there.
        UnknownColumn: no such label or batch.
    """
    positions, validation_positions = split.positions(reference, TRAIN), split.positions(reference, VALIDATION)
    if not len(positions):
        raise NoTrainingCells(f"The split leaves none of {reference.n_obs:,} cells to train on.")
    batches = batch_names(config, reference[positions])
    chosen = choose_genes(config, reference, positions, batches) if genes is None else genes
    obsm = obsm_names(config, reference)
    train: Cells | StoredCells
    validation: Cells | StoredCells
    if sp.issparse(reference.X):
        train = encode_cells(config, reference[positions], chosen, batches, obsm)
        validation = encode_cells(config, reference[validation_positions], chosen, batches, obsm)
    else:
        train, validation = (
            StoredCells(
                scratch,
                len(chosen),
                *encode_obs(config, part, batches),
                part.obs_names.to_numpy(dtype=object),
                encode_obsm(part, obsm),
            )
            for part in (reference[positions], reference[validation_positions])
        )
        parts = [(positions, train), (validation_positions, validation)]
        store(reference.X, parts, chosen, ", ".join(config.datasets), reference.obs_names, reference.var_names)
    return Prepared(
        train=train,
        validation=validation,
        var=reference.var.iloc[chosen].copy(),
        batches=batches,
        dimensions=Dimensions(
            n_genes=len(chosen),
            n_batches=len(batches),
            n_classes={level.name: len(level.classes) for level in config.labels},
            batch_levels=batch_levels(config, batches),
            obsm=obsm,
        ),
        statistics=measure(config, train),
    )


def choose_genes(
    config: Config, reference: AnnData, positions: NDArray[np.int64], batches: tuple[str, ...]
) -> NDArray[np.int64]:
    """Positions of the model's genes, ranked on the training cells at `positions` or on a sample of them."""
    rule = config.genes
    if config.start and config.start.keep_genes:
        return np.arange(reference.n_vars)
    if rule.rule == BY_NAME:
        return select_named(reference.var, rule.names)
    if len(positions) > rule.sample:
        positions = np.sort(np.random.default_rng(config.seed).choice(positions, rule.sample, replace=False))
    part = reference[positions]
    batch, labels = encode_obs(config, part, batches)
    named = np.flatnonzero((reference.var[["gene_id", "gene_symbol"]] != "").any(axis=1))
    if sp.issparse(reference.X):
        counts = sp.csr_matrix(part.X, dtype=np.float32)
    else:
        counts = read_rows(reference.X, positions, config.datasets[0], reference.obs_names, reference.var_names)
    found = TrainingCells(counts[:, named], batch, labels[:, 0] if labels.shape[1] else np.full(len(positions), -1))
    return named[select_genes(found, rule.rule, rule.n_genes, rule.min_cells, rule.min_variance)]


def measure(config: Config, train: Cells | StoredCells) -> Statistics:
    """Mean and deviation of each gene's ln(1 + counts per target_sum), cells of each class, and the largest library."""
    n_cells = len(train)
    mean = square = np.float64(0.0)
    largest = 1.0
    for start in range(0, n_cells, _MEASURED):
        counts = train.take(np.arange(start, min(start + _MEASURED, n_cells))).counts
        library = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64), 1.0)
        largest = max(largest, float(library.max(initial=1.0)))
        values = sp.csr_matrix(counts.multiply(config.hyperparameters.target_sum / library)).log1p()
        # As scipy's mean does: divided first, then summed.
        mean = mean + np.asarray((values * (1.0 / n_cells)).sum(axis=0)).ravel()
        square = square + np.asarray((values.multiply(values) * (1.0 / n_cells)).sum(axis=0)).ravel()
    variance = square - mean**2
    std = np.sqrt(np.where(variance > 1e-12, variance, 1.0))
    n_by_class = {}
    for i, level in enumerate(config.labels):
        labels = train.labels[:, i]
        found = np.bincount(labels[labels >= 0], minlength=len(level.classes))
        n_by_class[level.name] = torch.from_numpy(found).float()
    obsm = {key: torch.from_numpy(values) for key, values in train.obsm.items()}
    return Statistics(torch.from_numpy(mean).float(), torch.from_numpy(std).float(), n_by_class, obsm, largest)
