"""How a level's probabilities are calibrated: logits = weight · ln p + bias, fitted on cells that the network has not been trained on.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599), vector scaling (ibid.) and Dirichlet calibration (Kull et al. 2019,
arXiv:1910.12656) are this map with ever more freedom, so that one graph serves all. Isotonic regression is no such map: it calibrates
one class against the rest, and its classes must then be made to sum to one again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.contract.annotation import LabelLevel, Reliability, ReliabilityBin, parent_codes

SMALLEST = 1e-30
"""Probabilities are taken to be at least this before their logarithm."""

METHODS = ("none", "temperature", "vector", "dirichlet")
N_FOLDS = 5
PENALTY = 1.0
"""Of squared distances from temperature scaling, and of the squared logarithm of what all logits are multiplied by, beside the summed
log-loss. The first keeps rare classes from having a fit of their own noise. Without the second, cells that are all right would be fitted
best by certainty, and the first wrong cell after them would cost tens of nats."""

N_STEPS = 200
N_BINS, N_SHOWN = 15, 10

Labels = NDArray[np.int64]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Map:
    """What is done to a level's logarithmic probabilities."""

    weight: Array
    """(n_classes, n_classes); row k makes the logit of class k."""

    bias: Array
    """(n_classes,)."""

    @classmethod
    def identity(cls, n_classes: int) -> "Map":
        """Nothing is done."""
        return cls.scale(n_classes, 1.0)

    @classmethod
    def scale(cls, n_classes: int, factor: float) -> "Map":
        """All logits are so many times as large."""
        return cls(factor * np.eye(n_classes), np.zeros(n_classes))


def groups(levels: Sequence[LabelLevel]) -> dict[str, NDArray[np.int64]]:
    """By level the group of each class: its parent's position, or 0 for all where the level has none."""
    return {
        level.name: np.zeros(len(level.classes), np.int64)
        if level.parent is None
        else parent_codes(tuple(levels), level)
        for level in levels
    }


def within(logits: Tensor, group: Tensor) -> Tensor:
    """Softmax among the classes of one group, (n, n_classes): the probability of a class if its parent is right."""
    found = torch.zeros_like(logits)
    for number in torch.unique(group):
        members = torch.nonzero(group == number).flatten()
        found[:, members] = torch.softmax(logits[:, members], dim=1)
    return found


def compose(levels: Sequence[LabelLevel], conditional: Mapping[str, Array]) -> dict[str, Array]:
    """Probabilities by level from those within their parents: each is the parent's times the class's own share of it."""
    found: dict[str, Array] = {}
    for level in levels:
        own = conditional[level.name]
        found[level.name] = (
            own if level.parent is None else own * found[level.parent][:, parent_codes(tuple(levels), level)]
        )
    return found


def fit_map(method: str, probabilities: Array, labels: Labels, group: NDArray[np.int64]) -> Map:
    """The map of a method with the least log-loss, and PENALTY, among the classes of each cell's own group.

    Args:
        method: one of METHODS.
        probabilities: of the network, (n_cells, n_classes).
        labels: true classes, (n_cells,), none of them -1.
        group: of each class, (n_classes,); classes are only told apart within one.
    """
    n_classes = probabilities.shape[1]
    if method == "none" or not len(labels):
        return Map.identity(n_classes)
    log_p = _logarithm(probabilities)
    target, of_class = torch.from_numpy(labels), torch.from_numpy(group)
    is_same_group = (of_class[:, None] == of_class[None, :]).double()
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weight = torch.zeros((n_classes, n_classes), dtype=torch.float64, requires_grad=method != "temperature")
    bias = torch.zeros(n_classes, dtype=torch.float64, requires_grad=method != "temperature")
    eye = torch.eye(n_classes, dtype=torch.float64)
    free = eye if method == "vector" else is_same_group

    def parts() -> tuple[Tensor, Tensor]:
        return torch.exp(scale) * eye + weight * free, bias

    def loss() -> Tensor:
        whole, offset = parts()
        p = within(log_p @ whole.T + offset, of_class)[torch.arange(len(target)), target]
        penalty = scale**2 + ((weight * free) ** 2).sum() + (bias**2).sum()
        return -torch.log(p.clamp(min=SMALLEST)).mean() + PENALTY * penalty / len(target)

    parameters = [scale] if method == "temperature" else [scale, weight, bias]
    optimizer = torch.optim.LBFGS(parameters, max_iter=N_STEPS, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    whole, offset = (part.detach().numpy().copy() for part in parts())
    return Map(whole, offset)


def apply_map(found: Map, probabilities: Array, group: NDArray[np.int64]) -> Array:
    """Calibrated probabilities within each group, (n_cells, n_classes)."""
    logits = _logarithm(probabilities) @ torch.from_numpy(found.weight).T + torch.from_numpy(found.bias)
    return np.asarray(within(logits, torch.from_numpy(group)).numpy())


def sureness(probabilities: Array, labels: Labels, group: NDArray[np.int64]) -> float:
    """How sure a network is: the median over cells of ln(p of the true class / p of the likeliest other class of its group).

    Label -1 and classes alone in their group do not count; 0 where nothing is left.
    """
    is_asked = (labels >= 0) & (np.bincount(group)[group] > 1)[labels]
    labels, log_p = labels[is_asked], _logarithm(probabilities[is_asked]).numpy()
    true = log_p[np.arange(len(labels)), labels]
    is_other = (group[None, :] == group[labels][:, None]) & (np.arange(len(group))[None, :] != labels[:, None])
    other = np.where(is_other, log_p, -np.inf).max(axis=1, initial=-np.inf)
    return float(np.median(true - other)) if len(labels) else 0.0


def folds(labels: Labels, seed: int, n_folds: int = N_FOLDS) -> NDArray[np.int64]:
    """A part of `n_folds` for each cell, so that classes are spread over all of them; so are neighbouring classes that are very small."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    found = np.empty(len(labels), np.int64)
    found[order] = np.arange(len(labels)) % n_folds
    return found


def fit_without(
    method: str, probabilities: Array, labels: Labels, group: NDArray[np.int64], fold: NDArray[np.int64]
) -> dict[int, Map]:
    """For each part of the cells the map that is fitted on the others; label -1 fits nothing."""
    found = {}
    for number in np.unique(fold):
        fitting = (fold != number) & (labels >= 0)
        found[int(number)] = fit_map(method, probabilities[fitting], labels[fitting], group)
    return found


def cross_fitted(
    without: Mapping[int, Map], probabilities: Array, group: NDArray[np.int64], fold: NDArray[np.int64]
) -> Array:
    """Calibrated probabilities within groups of all cells, each part by the map of `fit_without` that it had no share in."""
    found = np.empty_like(probabilities)
    for number, made in without.items():
        found[fold == number] = apply_map(made, probabilities[fold == number], group)
    return found


def log_loss(probabilities: Array, labels: Labels) -> float:
    """Mean of -ln p of the true class over cells with a label, in nats."""
    known = labels >= 0
    return float(-np.log(np.maximum(probabilities[known, labels[known]], SMALLEST)).mean())


def reliability(probabilities: Array, labels: Labels) -> Reliability:
    """How far the probabilities of cells with a label can be taken at their word."""
    known = labels >= 0
    confidence = probabilities[known].max(axis=1)
    is_right = probabilities[known].argmax(axis=1) == labels[known]

    def gather(n_bins: int) -> list[tuple[int, float, float]]:
        place = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
        inside = [place == number for number in range(n_bins)]
        return [(int(i.sum()), float(confidence[i].mean()), float(is_right[i].mean())) for i in inside if i.any()]

    error = sum(n * abs(mean - right) for n, mean, right in gather(N_BINS)) / len(confidence)
    return Reliability(
        log_loss=log_loss(probabilities, labels),
        expected_calibration_error=error,
        bins=tuple(
            ReliabilityBin(n_cells=n, confidence=min(mean, 1.0), accuracy=right) for n, mean, right in gather(N_SHOWN)
        ),
    )


def _logarithm(probabilities: Array) -> Tensor:
    return torch.log(torch.from_numpy(np.asarray(probabilities, np.float64)).clamp(min=SMALLEST))
