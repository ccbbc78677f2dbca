"""Mapping scores: how well a cell fits the reference, the higher the better. Each is a module on counts or latent that ONNX can hold."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from training.families.family import Family, Graph

N_NEIGHBOURS = 16
N_REFERENCE = 8192
"""Cells of the reference that are kept to look for neighbours among."""

N_COMPONENTS = 20
MIN_STD, CLIP = 0.2, 10.0
"""Of scaled expression, so that rare genes and single counts of them do not decide."""

RIDGE = 1e-3
"""Share of the mean variance that is added to every variance."""

_ROWS = 512

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Reference:
    """What a score is fitted on: cells that the network was trained on."""

    family: Family
    graphs: Mapping[str, Graph]
    counts: sp.csr_matrix
    """(n_cells, n_genes)."""

    latent: NDArray[np.float32]
    """(n_cells, n_latent)."""

    labels: NDArray[np.int64]
    """Of the level that classes are left out of, (n_cells,), -1 for none."""

    seed: int

    def sample(self) -> NDArray[np.int64]:
        """Positions of N_REFERENCE cells at most, classes as equally as their numbers allow: a rare one must have neighbours too."""
        n_cells = len(self.labels)
        if n_cells <= N_REFERENCE:
            return np.arange(n_cells)
        order = np.random.default_rng(self.seed).permutation(n_cells)
        number = np.empty(n_cells, np.int64)
        for code in np.unique(self.labels):
            members = order[self.labels[order] == code]
            number[members] = np.arange(len(members))
        # The first cell of every class, then the second of every class, and so on.
        return np.sort(order[np.argsort(number[order], kind="stable")][:N_REFERENCE])


class Score(nn.Module, ABC):
    """counts, latent or both → score (n,)."""

    inputs: tuple[str, ...]

    @classmethod
    @abstractmethod
    def fit(cls, reference: Reference) -> Arrays | None:
        """What is learned from the reference; None where this model has no such score."""

    @classmethod
    @abstractmethod
    def build(cls, graphs: Mapping[str, Graph], arrays: Arrays) -> Self:
        """The module from a family's graphs and from what was learned."""


class MaxProbability(Score):
    """Probability of the most probable class (Hendrycks & Gimpel 2017, arXiv:1610.02136)."""

    def __init__(self, classify: Graph) -> None:
        super().__init__()
        self.classify, self.inputs = classify.module, classify.inputs

    @classmethod
    def fit(cls, reference: Reference) -> Arrays | None:
        """Nothing needs to be learned."""
        return {} if "classify" in reference.graphs else None

    @classmethod
    def build(cls, graphs: Mapping[str, Graph], arrays: Arrays) -> Self:  # noqa: ARG003 - there are none
        """From the classifier alone."""
        return cls(graphs["classify"])

    def forward(self, known: Tensor) -> Tensor:
        """(n,)."""
        return self.classify(known)[0].amax(dim=1)


class Energy(Score):
    """Logarithm of the summed exponentials of the logits (Liu et al. 2020, arXiv:2010.03759)."""

    inputs = ("latent",)

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    @classmethod
    def fit(cls, reference: Reference) -> Arrays | None:
        """Nothing needs to be learned, but there must be logits of the latent."""
        return {} if reference.family.classifier is not None and "classify" in reference.graphs else None

    @classmethod
    def build(cls, graphs: Mapping[str, Graph], arrays: Arrays) -> Self:  # noqa: ARG003 - there are none
        """From the classifier alone."""
        return cls(graphs["classify"].module.family.classifier)

    def forward(self, latent: Tensor) -> Tensor:
        """(n,)."""
        logits = self.classifier(latent)[0]
        largest = logits.amax(dim=1)
        return largest + torch.log(row_sum(torch.exp(logits - largest[:, None])))


class Reconstruction(Score):
    """Poisson log-likelihood per gene of the counts under what the decoder expects, less the best there can be: minus half the deviance."""

    inputs = ("counts", "latent")

    def __init__(self, decode: nn.Module, batches: list[int]) -> None:
        super().__init__()
        self.decode, self.batches = decode, batches

    @classmethod
    def fit(cls, reference: Reference) -> Arrays | None:
        """The batches that expectations are averaged over, for families whose decoder gives counts."""
        if "decode" not in reference.graphs or getattr(reference.family, "explains", "counts") == "detection":
            return None
        average = reference.family.average_batch
        n_batches = reference.graphs["decode"].module.family.dimensions.n_batches
        return {"batches": np.asarray(range(n_batches) if average is None else [average], dtype=np.float32)}

    @classmethod
    def build(cls, graphs: Mapping[str, Graph], arrays: Arrays) -> Self:
        """From the decoder."""
        return cls(graphs["decode"].module, [int(batch) for batch in arrays["batches"]])

    def forward(self, counts: Tensor, latent: Tensor) -> Tensor:
        """(n,)."""
        library = row_sum(counts)
        total = torch.zeros_like(counts)
        for batch in self.batches:
            found = self.decode(latent, library, torch.zeros_like(library).long() + batch)
            total = total + (found[0] if isinstance(found, tuple) else found)
        mean = (total / len(self.batches)).clamp(min=1e-6)
        ratio = torch.log(counts.clamp(min=1e-6) / mean)
        return -row_mean(counts * ratio - counts + mean)


class Space(nn.Module, ABC):
    """Where distances are taken."""

    inputs: tuple[str, ...]

    @classmethod
    @abstractmethod
    def fit(cls, reference: Reference) -> tuple[Arrays, NDArray[np.float32]]:
        """What is learned, and the points of the reference, (n_cells, n_dimensions)."""

    @abstractmethod
    def __init__(self, arrays: Arrays) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, known: Tensor) -> Tensor:
        """Points (n, n_dimensions)."""


class LatentSpace(Space):
    """The latent as it is."""

    inputs = ("latent",)

    @classmethod
    def fit(cls, reference: Reference) -> tuple[Arrays, NDArray[np.float32]]:
        """Nothing is learned."""
        return {}, reference.latent

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(arrays)

    def forward(self, known: Tensor) -> Tensor:
        """The same."""
        return known


class ExpressionSpace(Space):
    """Principal components of scaled ln(1 + counts per the run's target_sum): what a network has learned to leave out is still seen here."""

    inputs = ("counts",)

    @classmethod
    def fit(cls, reference: Reference) -> tuple[Arrays, NDArray[np.float32]]:
        """Location, scale and components of a sample of the reference."""
        counts = reference.counts[reference.sample()]
        target = np.array([reference.family.hyperparameters.target_sum], dtype=np.float32)
        values = _log_normalise(torch.from_numpy(counts.toarray()), torch.from_numpy(target)).numpy()
        arrays = {"target": target, "mean": values.mean(axis=0), "std": np.maximum(values.std(axis=0), MIN_STD)}
        scaled = ((values - arrays["mean"]) / arrays["std"]).clip(-CLIP, CLIP).astype(np.float64)
        found = PCA(min(N_COMPONENTS, *(size - 1 for size in values.shape)), svd_solver="full").fit(scaled)
        arrays |= {
            "centre": found.mean_.astype(np.float32),
            "components": found.components_.T.astype(np.float32).copy(),
        }
        return arrays, over_rows(cls(arrays), (reference.counts,))

    def __init__(self, arrays: Arrays) -> None:
        super().__init__(arrays)
        for name in ("target", "mean", "std", "centre", "components"):
            self.register_buffer(name, torch.from_numpy(arrays[name]))

    def forward(self, known: Tensor) -> Tensor:
        """Counts (n, n_genes) to (n, n_components)."""
        values = (_log_normalise(known, self.get_buffer("target")) - self.get_buffer("mean")) / self.get_buffer("std")
        return (values.clamp(-CLIP, CLIP) - self.get_buffer("centre")) @ self.get_buffer("components")


class DistanceScore(Score):
    """A score that is a function of a point in a space."""

    space_class: ClassVar[type[Space]]

    def __init__(self, space: Space, arrays: Arrays) -> None:
        super().__init__()
        self.space, self.inputs = space, space.inputs
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array))

    @classmethod
    def fit(cls, reference: Reference) -> Arrays | None:
        """What the space and the score learn."""
        of_space, points = cls.space_class.fit(reference)
        return {f"space_{name}": array for name, array in of_space.items()} | cls.learn(reference, points)

    @classmethod
    @abstractmethod
    def learn(cls, reference: Reference, points: NDArray[np.float32]) -> Arrays:
        """From the points of the reference, (n_cells, n_dimensions)."""

    @classmethod
    def build(cls, graphs: Mapping[str, Graph], arrays: Arrays) -> Self:  # noqa: ARG003 - distances need none
        """From what was learned alone."""
        of_space = {name.removeprefix("space_"): array for name, array in arrays.items() if name.startswith("space_")}
        own = {name: array for name, array in arrays.items() if not name.startswith("space_")}
        return cls(cls.space_class(of_space), own)

    def forward(self, known: Tensor) -> Tensor:
        """(n,)."""
        return self.score(self.space(known))

    @abstractmethod
    def score(self, points: Tensor) -> Tensor:
        """(n, n_dimensions) to (n,)."""


class Mahalanobis(DistanceScore):
    """Minus the squared distance to the nearest class, in units of the spread within classes (Lee et al. 2018, arXiv:1807.03888)."""

    @classmethod
    def learn(cls, reference: Reference, points: NDArray[np.float32]) -> Arrays:
        """Means of the classes, and what makes the spread within them a unit ball."""
        known = reference.labels >= 0
        inside, labels = points[known].astype(np.float64), reference.labels[known]
        codes = np.unique(labels)
        means = np.stack([inside[labels == code].mean(axis=0) for code in codes])
        whiten = _whiten(inside - means[np.searchsorted(codes, labels)])
        return {"whiten": whiten.astype(np.float32), "means": (means @ whiten).astype(np.float32)}

    def score(self, points: Tensor) -> Tensor:
        """(n, n_dimensions) to (n,)."""
        return (-squared_distances(points @ self.get_buffer("whiten"), self.get_buffer("means"))).amax(dim=1)


class RelativeMahalanobis(Mahalanobis):
    """The same less the distance to all cells as one class (Ren et al. 2021, arXiv:2106.09022)."""

    @classmethod
    def learn(cls, reference: Reference, points: NDArray[np.float32]) -> Arrays:
        """Also the mean and spread of all cells."""
        mean = points.astype(np.float64).mean(axis=0)
        whiten = _whiten(points - mean)
        every = {"whiten_all": whiten.astype(np.float32), "mean_all": (mean @ whiten).astype(np.float32)[None]}
        return super().learn(reference, points) | every

    def score(self, points: Tensor) -> Tensor:
        """(n, n_dimensions) to (n,)."""
        every = squared_distances(points @ self.get_buffer("whiten_all"), self.get_buffer("mean_all"))[:, 0]
        return super().score(points) + every


class Neighbours(DistanceScore):
    """Minus the root mean square distance to the nearest cells of the reference (Sun et al. 2022, arXiv:2204.06507)."""

    @classmethod
    def learn(cls, reference: Reference, points: NDArray[np.float32]) -> Arrays:
        """A sample of the points."""
        return {"points": np.ascontiguousarray(points[reference.sample()], dtype=np.float32)}

    def score(self, points: Tensor) -> Tensor:
        """(n, n_dimensions) to (n,)."""
        reference = self.get_buffer("points")
        nearest = torch.topk(
            squared_distances(points, reference), min(N_NEIGHBOURS, len(reference)), dim=1, largest=False
        )
        return -torch.sqrt(row_mean(nearest.values).clamp(min=0.0))


class LocalNeighbours(DistanceScore):
    """The same as a multiple of what is usual among those neighbours, so that dense and loose types compare (Breunig et al. 2000)."""

    @classmethod
    def learn(cls, reference: Reference, points: NDArray[np.float32]) -> Arrays:
        """A sample of the points, and the mean distance of each to its own neighbours."""
        kept = torch.from_numpy(np.ascontiguousarray(points[reference.sample()], dtype=np.float32))
        k = min(N_NEIGHBOURS + 1, len(kept))
        # A point is its own nearest.
        nearest = [
            torch.topk(squared_distances(some, kept), k, dim=1, largest=False).values[:, 1:]
            for some in kept.split(_ROWS)
        ]
        usual = torch.sqrt(torch.cat(nearest).mean(dim=1).clamp(min=0.0))
        return {"points": kept.numpy(), "usual": usual.clamp(min=1e-6).numpy()}

    def score(self, points: Tensor) -> Tensor:
        """(n, n_dimensions) to (n,)."""
        reference = self.get_buffer("points")
        nearest = torch.topk(
            squared_distances(points, reference), min(N_NEIGHBOURS, len(reference)), dim=1, largest=False
        )
        distance = torch.sqrt(row_mean(nearest.values).clamp(min=0.0))
        usual = nn.functional.embedding(nearest.indices, self.get_buffer("usual")[:, None])[:, :, 0]
        return -distance / row_mean(usual)


N_QUANTILES = 193
"""Of a score, to make percentiles of."""


class Percentile(nn.Module):
    """A score as the share of calibration cells with a lower one: it means the same for every candidate and every model."""

    def __init__(self, score: Score, quantiles: NDArray[np.float32]) -> None:
        """Wrap a score.

        Args:
            score: any.
            quantiles: of the calibration cells' scores, ascending, (n,). Below the lowest, what is left falls to a third for each further
                step as large as that from the median to it, so that far differs from farther.
        """
        super().__init__()
        self.score, self.inputs = score, score.inputs
        self.least = 1.0 / len(quantiles)
        self.tail = max(float(quantiles[len(quantiles) // 2] - quantiles[0]), 1e-6)
        self.register_buffer("start", torch.from_numpy(quantiles[:-1].copy()))
        self.register_buffer("width", torch.from_numpy(np.maximum(np.diff(quantiles), 1e-6).astype(np.float32)))

    def forward(self, known: Tensor, latent: Tensor | None = None) -> Tensor:
        """What the score takes, to (n,) between 0 and 1."""
        # Spelled out, since the exporter cannot match shapes to *arguments.
        score = (self.score(known) if latent is None else self.score(known, latent))[:, None]
        share = row_mean(((score - self.start) / self.width).clamp(0.0, 1.0))
        below = torch.exp(((score[:, 0] - self.start[0]) / self.tail).clamp(-40.0, 0.0))
        return below * (self.least + (1.0 - self.least) * share)


def quantiles_of(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `Percentile` takes, of a score's values for calibration cells."""
    return np.quantile(values, np.linspace(0, 1, N_QUANTILES)).astype(np.float32)


def _in_space(score: type[DistanceScore], space: type[Space]) -> type[DistanceScore]:
    return type(f"{space.__name__}{score.__name__}", (score,), {"space_class": space, "__doc__": score.__doc__})


DISTANCES: dict[str, type[DistanceScore]] = {
    "mahalanobis": Mahalanobis,
    "relative_mahalanobis": RelativeMahalanobis,
    "neighbours": Neighbours,
    "local_neighbours": LocalNeighbours,
}
SCORES: dict[str, type[Score]] = {
    "max_probability": MaxProbability,
    "energy": Energy,
    "reconstruction": Reconstruction,
    **{f"latent_{name}": _in_space(score, LatentSpace) for name, score in DISTANCES.items()},
    **{f"expression_{name}": _in_space(score, ExpressionSpace) for name, score in DISTANCES.items()},
}
"""The candidates. Adding one is a class and a line here."""


def over_rows(
    module: nn.Module, inputs: tuple[sp.csr_matrix | NDArray[np.float32], ...], output: int | None = None
) -> NDArray[np.float32]:
    """What a module gives for cells, some at a time; one of its outputs where it gives several."""
    found = []
    with torch.no_grad():
        for start in range(0, inputs[0].shape[0], _ROWS):
            rows = [array[start : start + _ROWS] for array in inputs]
            dense = [torch.from_numpy(some.toarray() if sp.issparse(some) else np.asarray(some)) for some in rows]
            given = module(*dense)
            found.append((given if output is None else given[output]).numpy())
    return np.concatenate(found)


def row_sum(values: Tensor) -> Tensor:
    """Sum over the second axis, (n,).

    By a product, since ONNX Runtime's ReduceSum gives a row other last bits where it begins at another place in memory.
    """
    return values @ torch.ones(values.shape[1], dtype=values.dtype)


def row_mean(values: Tensor) -> Tensor:
    """Mean over the second axis, (n,)."""
    return row_sum(values) / values.shape[1]


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """(n, d) and (m, d) to (n, m); tiny ones may come out below zero."""
    return row_sum(points**2)[:, None] - 2.0 * points @ others.T + (others**2).sum(dim=1)


def _log_normalise(counts: Tensor, target: Tensor) -> Tensor:
    return torch.log(counts / row_sum(counts).clamp(min=1.0)[:, None] * target + 1.0)


def _whiten(residuals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower factor L of the inverse covariance, so that |x L| is the Mahalanobis length of x."""
    covariance = residuals.T @ residuals / len(residuals)
    ridge = RIDGE * np.trace(covariance) / len(covariance) + 1e-12
    return np.asarray(np.linalg.cholesky(np.linalg.inv(covariance + ridge * np.eye(len(covariance)))))
