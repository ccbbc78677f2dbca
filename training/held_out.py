"""What the model card says of cells that the model was not trained on: figures with intervals, and who is taken for whom."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.inference.annotate import best_classes
from service.inference.model import Model
from training.data.splits import PUBLISHED, TEST
from training.evaluation.annotation import is_annotating
from training.report.measures import Annotation, annotation
from training.run import Run

N_DRAWS, SHARE, SEED = 1_000, 0.95, 0
"""Of the bootstrap over cells (Efron and Tibshirani 1993)."""


@dataclass(frozen=True)
class Interval:
    """A figure, and where it would lie for other cells of the same kind in 95 of 100 cases."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Figures:
    """Of one level on one set of cells."""

    level: str
    cells: str
    n_cells: int
    accuracy: Interval
    macro_f1: Interval


@dataclass(frozen=True)
class HeldOut:
    """The answers of a served model."""

    figures: tuple[Figures, ...]
    annotations: Mapping[str, Annotation]
    """Of all held-out cells together, by level."""


def measure(run: Run, model: Model) -> HeldOut | None:
    """Ask a served model about test cells, and about those that were published apart; None for a run without labels or such cells."""
    positions = run.split.positions(run.reference, TEST, PUBLISHED)
    if not is_annotating(run) or not len(positions):
        return None
    counts = sp.csr_matrix(run.reference[positions, run.prepared.var.index].X, dtype=np.float32)
    probabilities = model.classify(counts)
    answers = best_classes(model.manifest.labels, probabilities)
    obs = run.reference.obs.iloc[positions]
    parts = np.array([run.split.part[name] for name in obs.index])
    of_set = np.where(parts == PUBLISHED, "published apart", obs["dataset"].astype(str))
    figures, annotations = [], {}
    for level in run.config.labels:
        labels = obs[level.name].astype(str).to_numpy(dtype=object)
        labels[~np.isin(labels, list(level.classes))] = ""
        found = annotation(labels, probabilities[level.name], level.name, tuple(level.classes))
        if found is None:
            continue
        annotations[level.name] = found
        number = {name: code for code, name in enumerate(level.classes)}
        truth = np.array([number.get(name, -1) for name in labels])
        for name in dict.fromkeys(of_set):
            chosen = (of_set == name) & (truth >= 0)
            if chosen.any():
                accuracy, macro_f1 = intervals(truth[chosen], answers[level.name][chosen])
                figures.append(Figures(level.name, name, int(chosen.sum()), accuracy, macro_f1))
    return HeldOut(tuple(figures), annotations)


def intervals(truth: NDArray[np.int64], answers: NDArray[np.int64]) -> tuple[Interval, Interval]:
    """Accuracy and macro-F1 with percentiles of the bootstrap over cells."""
    draws = np.random.default_rng(SEED).integers(len(truth), size=(N_DRAWS, len(truth)))
    accuracies = (truth == answers)[draws].mean(axis=1)
    f1s = [macro_f1(truth[draw], answers[draw]) for draw in draws]
    tail = 100 * (1 - SHARE) / 2
    return (
        Interval(float((truth == answers).mean()), *np.percentile(accuracies, [tail, 100 - tail]).tolist()),
        Interval(macro_f1(truth, answers), *np.percentile(f1s, [tail, 100 - tail]).tolist()),
    )


def macro_f1(truth: NDArray[np.int64], answers: NDArray[np.int64]) -> float:
    """Over the classes that the cells have: scikit-learn's `f1_score`, which would take most of an export for a thousand draws."""
    n_classes = 1 + int(max(truth.max(), answers.max()))
    hits = truth[truth == answers]
    n_hits, n_true, n_said = (np.bincount(codes, minlength=n_classes) for codes in (hits, truth, answers))
    is_there = n_true > 0
    return float((2 * n_hits[is_there] / (n_true + n_said)[is_there]).mean())
