"""What a report says in figures: reconstruction, annotation with its calibration, and agreement of clusters with labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import (
    accuracy_score,
    adjusted_mutual_info_score,
    adjusted_rand_score,
    confusion_matrix,
    f1_score,
    normalized_mutual_info_score,
)

from training.report.sample import Sample

N_BINS = 10
"""Of confidence, equally wide (Guo et al. 2017, arXiv:1706.04599)."""


@dataclass(frozen=True)
class Reconstruction:
    """Observed against reconstructed counts."""

    observed_gene: NDArray[np.float64]
    """Mean counts per gene, (n_genes,)."""

    predicted_gene: NDArray[np.float64]
    observed_cell: NDArray[np.float64]
    """Counts per cell over the model's genes, (n,)."""

    predicted_cell: NDArray[np.float64]
    gene_correlation: float
    """Pearson's r of ln(1 + mean) over genes; NaN where one side is constant."""

    cell_correlation: float
    """Pearson's r of ln(1 + counts) over cells."""

    within_cell: float
    """Median over cells of Pearson's r of ln(1 + counts) over genes."""


@dataclass(frozen=True)
class Annotation:
    """Classes of one level against labels, on cells that have one."""

    level: str
    classes: tuple[str, ...]
    n_cells: int
    confusion: NDArray[np.int64]
    """Rows are labels, columns answers, (n_classes, n_classes)."""

    accuracy: float
    macro_f1: float
    """Over the classes that the cells have."""

    expected_calibration_error: float
    n_in_bin: NDArray[np.int64]
    """Cells by confidence, (N_BINS,)."""

    confidence: NDArray[np.float64]
    """Mean of each bin, NaN where it is empty."""

    correct: NDArray[np.float64]
    """Share of each bin that is right, NaN where it is empty."""


@dataclass(frozen=True)
class Agreement:
    """A clustering against labels."""

    level: str
    method: str
    n_cells: int
    n_clusters: int
    ari: float
    ami: float
    nmi: float


def reconstruction(sample: Sample) -> Reconstruction:
    """Observed against reconstructed counts of the sample."""
    observed, predicted = sample.counts.toarray().astype(np.float64), sample.expected.astype(np.float64)
    genes, cells = [m.mean(axis=0) for m in (observed, predicted)], [m.sum(axis=1) for m in (observed, predicted)]
    within = [correlation(np.log1p(a), np.log1p(b)) for a, b in zip(observed, predicted.clip(min=0), strict=True)]
    return Reconstruction(
        *genes,
        *cells,
        gene_correlation=correlation(*(np.log1p(values.clip(min=0)) for values in genes)),
        cell_correlation=correlation(*(np.log1p(values.clip(min=0)) for values in cells)),
        within_cell=float(np.median(found)) if (found := [r for r in within if np.isfinite(r)]) else float("nan"),
    )


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's r, NaN where one side is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def annotation(
    labels: NDArray[np.object_], probabilities: NDArray[np.float32], level: str, classes: Sequence[str]
) -> Annotation | None:
    """The classifier's answers on cells with a label; None where none has one.

    Args:
        labels: of the cells, empty where there is none, (n,).
        probabilities: (n, n_classes).
        level: name of the label level.
        classes: its classes, in the order of the columns.
    """
    labelled = labels != ""
    if not labelled.any():
        return None
    probabilities = probabilities[labelled].astype(np.float64)
    number = {name: i for i, name in enumerate(classes)}
    truth = np.array([number[name] for name in labels[labelled]])
    found, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = found == truth
    # Half-open from above, so that a confidence of 1 is in the last bin and a multiple of 1/N_BINS in the lower one.
    place = np.clip(np.ceil(confidence * N_BINS).astype(int) - 1, 0, N_BINS - 1)
    n_in_bin = np.bincount(place, minlength=N_BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, N_BINS) / n_in_bin
        correct = np.bincount(place, right, N_BINS) / n_in_bin
    gap = np.where(n_in_bin, np.abs(mean - correct), 0.0)
    return Annotation(
        level=level,
        classes=tuple(classes),
        n_cells=len(truth),
        confusion=confusion_matrix(truth, found, labels=np.arange(len(classes))),
        accuracy=float(accuracy_score(truth, found)),
        macro_f1=float(f1_score(truth, found, average="macro", labels=np.unique(truth), zero_division=0.0)),
        expected_calibration_error=float((gap * n_in_bin).sum() / len(truth)),
        n_in_bin=n_in_bin,
        confidence=mean,
        correct=correct,
    )


def agreements(sample: Sample, level: str, seed: int = 0) -> list[Agreement]:
    """k-means on the latent, with as many clusters as there are classes, and each clustering or classifier of the model's own."""
    labels = sample.labels[level]
    labelled = labels != ""
    n_classes = len(set(labels[labelled]))
    if n_classes < 2:
        return []
    latent = sample.latent[labelled].astype(np.float64)
    # A latent that has collapsed has fewer different cells than classes.
    k = min(n_classes, len(np.unique(latent, axis=0)))
    clusters = {"k-means on the latent": KMeans(k, n_init=10, random_state=seed).fit_predict(latent)}
    for name, values in sample.probabilities.items():
        if name not in sample.labels or name == level:
            method = f"the model's classes of {name}" if name in sample.labels else f"the model's clusters ({name})"
            clusters[method] = values[labelled].argmax(axis=1)
    truth = labels[labelled].astype(str)
    return [
        Agreement(
            level,
            method,
            len(truth),
            len(set(found)),
            *(
                float(score(truth, found))
                for score in (adjusted_rand_score, adjusted_mutual_info_score, normalized_mutual_info_score)
            ),
        )
        for method, found in clusters.items()
    ]
