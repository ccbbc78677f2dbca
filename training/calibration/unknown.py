"""Which mapping score tells cells of an unknown type best, and below which value: found by networks that never met one type."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from service.contract.annotation import LeftOut, UnknownDetection
from training import fit as fitting
from training.calibration.folds import CalibrationCells
from training.calibration.scores import SCORES, Arrays, Reference, over_rows
from training.config import Config
from training.data.prepared import Prepared, prepare
from training.data.splits import CALIBRATION, TRAIN, VALIDATION, Split
from training.evaluation.cells import read
from training.families.family import Family, Graph
from training.run import Run

MIN_CELLS = 10
"""Cells that a class needs to be left out, and to be detected."""

MAX_REFERENCE = 20_000
"""Training cells that scores are fitted on, drawn at random where there are more."""

REJECTIONS = np.linspace(0.005, 0.05, 10)
"""Shares of known cells that may be called Unknown, to choose from."""


@dataclass(frozen=True)
class Candidate:
    """A score that was fitted on a model, with what it says of that model's known cells."""

    arrays: Arrays
    known: NDArray[np.float32]


@dataclass(frozen=True)
class Trial:
    """A model without a class: what each score says of cells that it knows and of cells of that class."""

    name: str
    known: dict[str, NDArray[np.float32]]
    unknown: dict[str, NDArray[np.float32]]


def choose(
    given: CalibrationCells, share_of_epochs: float, show: Callable[[str], object] = str
) -> UnknownDetection | None:
    """Choose the score and its threshold.

    Args:
        given: the known cells, of a run with labels and a classifier.
        share_of_epochs: of the configuration's, for the networks without a class.
        show: told what is being done.

    Returns:
        What the manifest says; None where fewer than three classes have cells enough.
    """
    run = given.run
    level = run.config.labels[0]
    labels = run.reference.obs[level.name].astype(str)
    parts = run.split.positions(run.reference, TRAIN, VALIDATION, CALIBRATION)
    numbers = labels.iloc[parts].value_counts()
    left_out = [name for name in level.classes if numbers.get(name, 0) >= MIN_CELLS]
    if len(left_out) < 3:
        return None
    trials = []
    for number, name in enumerate(left_out):
        show(f"training without {name}")
        split, positions = given.trial(number)
        known = positions[(labels.iloc[positions] != name).to_numpy()]
        unknown = parts[(labels.iloc[parts] == name).to_numpy()]
        trials.append(leave_out(run.config, run.reference, split, name, known, unknown, share_of_epochs))
    auroc = {trial.name: aurocs(trial) for trial in trials}
    mean = means(auroc)
    chosen = max(mean, key=lambda score: mean[score])
    detected = {trial.name: _detection(trial, chosen) for trial in trials}
    balance = np.mean([found - REJECTIONS for found in detected.values()], axis=0)
    best = int(balance.argmax())
    return UnknownDetection(
        score=chosen,
        threshold=round(float(REJECTIONS[best]), 4),
        level=level.name,
        share_of_epochs=share_of_epochs,
        cells=given.cells,
        n_cells=len(given.positions),
        n_folds=given.n_folds,
        mean_auroc=mean,
        left_out=tuple(
            LeftOut(
                name=trial.name,
                n_known=len(trial.known[chosen]),
                n_unknown=len(trial.unknown[chosen]),
                auroc={score: auroc[trial.name][score] for score in mean},
                detected=float(detected[trial.name][best]),
                rejected=float(REJECTIONS[best]),
            )
            for trial in trials
        ),
    )


def fit_score(run: Run, name: str) -> Arrays:
    """What a score that was chosen learns from the training cells of a run."""
    arrays = SCORES[name].fit(_reference(run.family, run.prepared, run.config.seed))
    assert arrays is not None, "another network of the same family has this score"
    return arrays


def without(config: Config, name: str, share_of_epochs: float) -> Config:
    """The configuration of a shorter run that does not know a class of the first level, nor those below it."""
    gone = {config.labels[0].name: {name}}
    levels = []
    for level in config.labels:
        if level.parent is not None:
            gone[level.name] = {one for one, parent in level.parents.items() if parent in gone.get(level.parent, set())}
        lost = gone.get(level.name, set())
        kept = {one: term for one, term in level.classes.items() if one not in lost}
        parents = {one: parent for one, parent in level.parents.items() if one not in lost}
        values = {own: one for own, one in level.values.items() if one not in lost}
        levels.append(level.model_copy(update={"classes": kept, "parents": parents, "values": values}))
    n_epochs = max(1, round(share_of_epochs * config.fit.max_epochs))
    fit = config.fit.model_copy(update={"max_epochs": n_epochs, "loggers": ()})
    return config.model_copy(update={"labels": tuple(levels), "fit": fit})


def leave_out(
    config: Config,
    reference: AnnData,
    split: Split,
    name: str,
    known: NDArray[np.int64],
    unknown: NDArray[np.int64],
    share_of_epochs: float,
) -> Trial:
    """Train without a class of the first level, and ask every score about cells that the model knows and about others.

    Args:
        config: of a run of all classes.
        reference: its cells.
        split: part of each.
        name: of the class.
        known: positions of cells of other classes that are not trained on.
        unknown: positions of cells of the class.
        share_of_epochs: of the configuration's.
    """
    config = without(config, name, share_of_epochs)
    is_gone = set(reference.obs_names[(reference.obs[config.labels[0].name].astype(str) == name).to_numpy()])
    kept = Split({cell: part for cell, part in split.part.items() if cell not in is_gone})
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(config, reference, kept, Path(scratch))
        family = fitting.fit(config, prepared, Path(scratch), show_progress=False).family.eval()
        without_it = Run(config, reference, split, prepared, family, {})
        counts, others = (read(without_it, positions).counts for positions in (known, unknown))
        found = candidates(family, prepared, counts, config.seed)
        graphs = family.graphs()
        return Trial(
            name,
            {score: one.known for score, one in found.items()},
            {score: values(graphs, score, one.arrays, others) for score, one in found.items()},
        )


def candidates(family: Family, prepared: Prepared, known: sp.csr_matrix, seed: int) -> dict[str, Candidate]:
    """Scores fitted on the training cells of a model, and what they say of other cells that it knows."""
    reference = _reference(family, prepared, seed)
    found = {}
    for name in SCORES:
        arrays = SCORES[name].fit(reference)
        if arrays is not None:
            found[name] = Candidate(arrays, values(reference.graphs, name, arrays, known))
    return found


def _reference(family: Family, prepared: Prepared, seed: int) -> Reference:
    graphs = family.eval().graphs()
    n_cells = len(prepared.train)
    chosen = np.arange(n_cells)
    if n_cells > MAX_REFERENCE:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MAX_REFERENCE, replace=False))
    cells = prepared.train.take(chosen)
    latent = over_rows(graphs["encode"].module, (cells.counts,))
    return Reference(family, graphs, cells.counts, latent, cells.labels[:, 0], seed)


def values(graphs: Mapping[str, Graph], name: str, arrays: Arrays, counts: sp.csr_matrix) -> NDArray[np.float32]:
    """What a score that was fitted says of cells, (n_cells,)."""
    module = SCORES[name].build(graphs, arrays).eval()
    known = {"counts": counts, "latent": over_rows(graphs["encode"].module, (counts,))}
    return over_rows(module, tuple(known[tensor] for tensor in module.inputs))


def aurocs(trial: Trial) -> dict[str, float]:
    """How well each score tells the cells of the class from the others; 0.5 is chance."""
    found = {}
    for score, known in trial.known.items():
        truth = np.concatenate([np.zeros(len(known)), np.ones(len(trial.unknown[score]))])
        found[score] = float(roc_auc_score(truth, -np.concatenate([known, trial.unknown[score]])))
    return found


def means(auroc: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over classes of each score's AUROC; of the scores that every class has. The largest is the best score.

    Not the median: a score that misses one type altogether must not be the best.
    """
    shared = set.intersection(*(set(found) for found in auroc.values()))
    return {score: float(np.mean([found[score] for found in auroc.values()])) for score in SCORES if score in shared}


def _detection(trial: Trial, score: str) -> NDArray[np.float64]:
    """Share of the class's cells below the value under which each of REJECTIONS of the known cells lie, in this very model."""
    limits = np.quantile(trial.known[score], REJECTIONS)
    return np.asarray((trial.unknown[score][None, :] < limits[:, None]).mean(axis=1), dtype=np.float64)
