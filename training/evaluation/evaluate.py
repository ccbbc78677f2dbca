"""All figures of a run, in one document: evaluation.json."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.splits import TEST, TRAIN, VALIDATION
from training.evaluation import annotation, models
from training.evaluation.abilities import cluster_probabilities, decodes_counts, has_likelihood
from training.evaluation.cells import PARTS, Sample, dense, draw, encode, minibatches
from training.evaluation.integration import integration
from training.evaluation.latent import agreement
from training.evaluation.losses import evidence_bound, loss_parts
from training.evaluation.molecules import held_out_molecules
from training.evaluation.reconstruction import reconstruction
from training.families.family import Family
from training.run import Run

EVALUATION = "evaluation.json"
SCHEMA_VERSION = 1
"""Of evaluation.json; raised when a member changes its meaning or goes."""

MAX_CELLS = 20_000
"""Of each part of the split, unless another number is asked for."""

INTEGRATION_CELLS = 4_000
"""Cells that scib-metrics are computed on, drawn at random where there are more."""

Show = Callable[[str], object]


class NothingHeldOut(Exception):
    """A run has met all of its cells."""


def evaluate(
    run: Run,
    directory: Path,
    which: tuple[str, ...] = (models.BEST,),
    max_cells: int = MAX_CELLS,
    columns: tuple[str, ...] = (),
    is_across: bool = True,
    show: Show = str,
) -> dict[str, Any]:
    """Measure a run; also written to evaluation.json in its directory.

    Args:
        run: a finished run; it needs no labels.
        directory: of the run.
        which: models to measure in full, of BEST and LAST. The parts of the loss are given for both, where the last was kept.
        max_cells: of each part of the split; of more, that many are drawn at random.
        columns: of `obs`, to be compared with as labels are, beside the run's own label levels.
        is_across: whether annotation is also tried with models trained on one data set each.
        show: told what is being done.

    Returns:
        The document, as docs/evaluate.md describes it: numbers as they are, None for what is not defined.

    Raises:
        NothingHeldOut: the split has neither test nor validation cells.
        NoCheckpoint: the last model is asked for and was not kept.
        UnknownColumn: no such column.
    """
    if not len(run.held_out):
        raise NothingHeldOut(
            f"{run.config.name} has neither test nor validation cells, and figures of cells that it was trained on say nothing of others. Fit "
            "it with split.test or split.validation above 0."
        )
    found = {name: models.load(run, directory, name) for name in which}
    for name in (models.BEST, models.LAST):
        if name not in found and (name == models.BEST or models.has_last(directory)):
            found[name] = models.load(run, directory, name)
    samples = {part: draw(run, (part,), max_cells, columns) for part in PARTS}
    samples["all"] = draw(run, PARTS, max_cells, columns)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": run.config.name,
        "family": run.config.family,
        "seed": run.config.seed,
        "cells": {name: {"n_cells": len(sample), "n_all": sample.n_all} for name, sample in samples.items()},
        "annotation": annotation.compare_methods(run, is_across, show),
        "models": {},
    }
    for name, model in sorted(found.items()):
        twin = next((one for one in document["models"].values() if one["epoch"] == model.epoch + 1), None)
        if twin is not None and (name not in which or models.BEST in which):
            # Training ended with its best epoch.
            document["models"][name] = {**twin, "what": models.MEANING[name]}
            continue
        show(f"loss of the {name} model")
        figures: dict[str, Any] = {"epoch": model.epoch + 1, "what": models.MEANING[name]}
        figures["loss"] = _losses(run, model.family, samples)
        if name in which:
            figures |= _measure(run, model.family, samples, name, show)
        document["models"][name] = figures
    document = finite(document)
    (directory / EVALUATION).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def _losses(run: Run, family: Family, samples: dict[str, Sample]) -> dict[str, dict[str, float]]:
    """By part of the split, with the evidence bound where the family has its two parts."""
    found = {}
    n_batches, rows = run.prepared.dimensions.n_batches, run.config.fit.rows
    for part in (TRAIN, VALIDATION, TEST):
        if len(samples[part]):
            parts = loss_parts(family, samples[part].cells, n_batches, rows, run.config.seed)
            bound = evidence_bound(parts)
            if bound is not None:
                parts["evidence_bound"] = bound
            found[part] = parts
    return found


def _measure(run: Run, family: Family, samples: dict[str, Sample], name: str, show: Show) -> dict[str, Any]:
    """Everything but the loss. Cells that the model has not met are those of the test part, or the validation cells where it is empty."""
    n_batches, seed = run.prepared.dimensions.n_batches, run.config.seed
    apart = TEST if len(samples[TEST]) else VALIDATION
    held_out = samples[apart].cells
    figures: dict[str, Any] = {"annotation": annotation.annotate(run, family), "held_out_part": apart}
    figures["held_out_molecules"] = figures["reconstruction"] = None
    if decodes_counts(family):
        show(f"held-out molecules of the {name} model")
        train = samples[TRAIN].cells.counts
        figures["held_out_molecules"] = held_out_molecules(family, held_out, train, n_batches, seed)
    if has_likelihood(family):
        show(f"likelihood of the {name} model")
        figures["reconstruction"] = reconstruction(family, held_out, n_batches)
    show(f"clusters of the {name} model")
    figures["latent"] = {}
    for part in (apart, "all"):
        sample = samples[part]
        latent = encode(family, sample.cells.counts).numpy()
        figures["latent"][part] = agreement(latent, sample.labels, clusters(family, sample), seed)
    show(f"batches of the {name} model")
    everything = samples["all"]
    chosen = np.arange(len(everything))
    if len(chosen) > INTEGRATION_CELLS:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, INTEGRATION_CELLS, replace=False))
    level = next((level for level, codes in everything.labels.items() if (codes >= 0).any()), None)
    cells = everything.cells.take(chosen)
    classes = None if level is None else everything.labels[level][chosen]
    figures["integration"] = {"label": level, **integration(latent[chosen], cells, classes, seed)}
    return figures


def clusters(family: Family, sample: Sample) -> NDArray[np.int64] | None:
    """The most probable component of each cell, (n_cells,); None for a family without a mixture."""
    found = []
    with torch.no_grad():
        for rows in minibatches(len(sample)):
            probabilities = cluster_probabilities(family, dense(sample.cells.counts[rows]))
            if probabilities is None:
                return None
            found.append(probabilities.argmax(dim=1).numpy())
    return np.concatenate(found)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
