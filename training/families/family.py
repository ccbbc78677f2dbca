"""What a family is: the interface that every file of this folder fills."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from training.networks import Classifier, InputTransform, class_weights


class Hyperparameters(BaseModel):
    """What all families have; each adds its own. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: tuple[Annotated[int, Field(gt=0)], ...] = (256, 128, 64)
    """Widths of the encoder's layers; the decoder has them in reverse."""

    n_latent: Annotated[int, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the encoder's hidden units dropped while training."""

    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of transformed inputs dropped while training, so that no single gene is relied on."""

    layer_norm: bool = False
    """Normalise each hidden layer of encoder and decoder within a cell."""

    target_sum: Annotated[float, Field(gt=0)] = 1e4
    """Counts per cell after the input's normalisation."""

    scale: bool = False
    """Subtract each gene's mean over training cells from the log-normalised input, and divide by its standard deviation."""

    min_std: Annotated[float, Field(ge=0)] = 0.0
    """Smallest deviation to divide by, so that noise in rare genes is not blown up."""

    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest absolute value of the transformed input."""


class ClassifyingHyperparameters(Hyperparameters):
    """What families with a classifier on the latent have beside the rest."""

    classifier_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy of the labels beside the rest of the loss. 0 leaves out the classifier."""

    classifier_hidden: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Widths of layers between latent and classes; none means multinomial regression on the latent."""

    class_weight_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0: every cell weighs the same in the cross-entropy. 1: every class does. Between: classes weigh 1 / number ** power."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label spread over all classes."""


@dataclass(frozen=True)
class BatchLevel:
    """One of the columns that technical batches are told apart by, for example the study or the donor."""

    name: str
    values: tuple[str, ...]
    codes: tuple[int, ...]
    """For each batch the position of its value in `values`."""


@dataclass(frozen=True)
class Dimensions:
    """What the data prescribe."""

    n_genes: int
    n_batches: int
    n_classes: Mapping[str, int]
    """By label level; empty for a model without labels."""

    batch_levels: tuple[BatchLevel, ...] = ()
    """Columns that the batches are combinations of, coarsest first; one where there is one column."""

    obsm: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What else is known of each cell, by key of `obsm`: names of the columns."""


@dataclass(frozen=True)
class Statistics:
    """What is known of the training cells before training."""

    mean: Tensor
    """Of each gene's log-normalised expression, float32 (n_genes,)."""

    std: Tensor
    """Likewise; 1 for a constant gene."""

    n_cells: Mapping[str, Tensor]
    """Training cells of each class, by label level, float32 (n_classes,)."""

    obsm: Mapping[str, Tensor] = field(default_factory=dict)
    """Values of the training cells by key of `obsm`, float32 (n_training_cells, n_columns), NaN where unknown."""

    largest_library: float = 1.0
    """Most counts that a training cell has."""


@dataclass(frozen=True)
class Example:
    """Cells as the loss meets them. `counts` may be corrupted (see Fit.thinning, Fit.gene_dropout); `target` never is."""

    counts: Tensor
    """Raw counts in, (n, n_genes)."""

    target: Tensor
    """Raw counts to explain, (n, n_genes)."""

    batch: Tensor
    """int64 (n,)."""

    labels: Tensor
    """int64 (n, n_levels), -1 for none."""

    epoch: int
    obsm: Mapping[str, Tensor] = field(default_factory=dict)
    """By key of `obsm`, float32 (n, n_columns); NaN where unknown."""


@dataclass(frozen=True)
class Imputed:
    """Something else than expression that the graph `decode` gives, and where the measured values of training cells are."""

    name: str
    """Of the output."""

    obsm_key: str
    features: tuple[str, ...]
    unit: str


@dataclass(frozen=True)
class Graph:
    """A module that becomes an ONNX file, and the names of its tensors."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    takes_gradient: bool = False
    """Whether the module calls autograd; its gradient is then written out as operators."""


Axis = tuple[tuple[str, ...], ...] | None
"""For each row (or column) its kind and name: ("gene", id), ("class", level, name), ("batch", level, value). None: the same in all runs."""


@dataclass(frozen=True)
class Names:
    """What genes and classes are called."""

    genes: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]]
    """By label level."""


class Family(nn.Module, ABC):
    """An encoder, a decoder and perhaps a classifier, all on raw counts."""

    name: ClassVar[str]
    """In configurations and manifests."""

    defaults: ClassVar[type[Hyperparameters]]
    """Its hyper-parameters with their defaults."""

    average_batch: int | None = None
    """Index with which `decode` takes the average batch itself; None where expressions are averaged instead."""

    encodes_library: bool = False
    """Whether the encoder is given a cell's library beside its transformed counts."""

    is_frozen: bool = False
    """Whether only the codes of new batches are fitted (see start.py)."""

    imputes: tuple[Imputed, ...] = ()
    """What `decode` gives beside expression."""

    transform: InputTransform
    """What the encoder sees of raw counts."""

    own_levels: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Label levels that `classify` gives beside those of the data: names of the classes."""

    @abstractmethod
    def __init__(self, hyperparameters: Hyperparameters, dimensions: Dimensions, statistics: Statistics) -> None:
        """Build the module with random weights; every hyper-parameter must have an effect."""
        super().__init__()
        self.classifier: Classifier | None = None

    def encode(self, counts: Tensor) -> Tensor:
        """Raw counts (n, n_genes) to the point estimate of the latent (n, n_latent)."""
        return self.encode_values(self.transform(counts), counts)

    @abstractmethod
    def encode_values(self, values: Tensor, counts: Tensor) -> Tensor:
        """Transformed counts (n, n_genes) to the latent (n, n_latent); the raw ones are for what else the encoder knows, as the depth."""

    def class_scores(self, values: Tensor, latent: Tensor) -> list[Tensor]:  # noqa: ARG002 - for classifiers of the counts
        """Logarithms of the class probabilities (n, n_classes), each cell's up to a constant, by level as `classify` gives them.

        Args:
            values: transformed counts, (n, n_genes).
            latent: what `encode_values` makes of them.
        """
        return [] if self.classifier is None else list(self.classifier(latent))

    @abstractmethod
    def loss(self, example: Example) -> dict[str, Tensor]:
        """Scalars by name: `loss` is minimised, the others are logged."""

    def conclude(self, examples: Iterable[Example]) -> None:
        """Learn what is not fitted by gradients, from the training cells, when the best epoch's weights are in."""

    @classmethod
    def obsm_keys(cls, hyperparameters: Hyperparameters) -> tuple[str, ...]:  # noqa: ARG003 - for families that need some
        """Keys of `obsm` that these hyper-parameters need beside the counts."""
        return ()

    def axes(self, names: Names) -> dict[str, tuple[Axis, ...]] | None:  # noqa: ARG002 - for families that can
        """What rows and columns of the tensors of `state_dict` stand for, where that depends on the data; others do not depend on them.

        None for a family that cannot begin with the weights of a run of other genes, batches or classes.
        """
        return None

    def train(self, mode: bool = True) -> Self:
        """Training mode; a family of which only the codes of new batches are fitted stays as it is served."""
        return super().train(mode and not self.is_frozen)

    @abstractmethod
    def graphs(self) -> dict[str, Graph]:
        """Modules to export by the names of the manifest, all taking raw counts or what they give."""

    def sample_latent(self, n: int, generator: torch.Generator) -> Tensor | None:  # noqa: ARG002 - for families with a prior
        """Latents (n, n_latent) drawn from the prior; None for a family without one."""
        return None

    def clusters(self, counts: Tensor) -> Tensor | None:  # noqa: ARG002 - for families with a mixture
        """Probabilities (n, n_clusters) of the mixture's components for raw counts (n, n_genes); None for a family without a mixture."""
        return None

    @abstractmethod
    def gene_weight(self) -> Tensor:
        """First linear layer of the encoder per unit of log-normalised expression, (n_hidden, n_genes)."""


class Encode(nn.Module):
    """counts (n, n_genes) → latent (n, n_latent)."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, counts: Tensor) -> Tensor:
        """The point estimate of the latent; nothing is drawn."""
        return self.family.encode(counts)


class Decode(nn.Module):
    """latent (n, n_latent), library (n,), batch int64 (n,) → expression (n, n_genes)."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """Expected counts of cells with `library` counts."""
        return self.family.decode(latent, library, batch)


class Classify(nn.Module):
    """latent (n, n_latent) → probabilities (n, n_classes) per level."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        """Class probabilities, one tensor per label level."""
        return tuple(torch.softmax(logits, dim=1) for logits in self.family.classifier(latent))


def build_classifier(hyperparameters: ClassifyingHyperparameters, statistics: Statistics) -> Classifier | None:
    """The classifier on the latent; None without labels or weight."""
    hp = hyperparameters
    if not (hp.classifier_weight and statistics.n_cells):
        return None
    weights = {level: class_weights(n_cells, hp.class_weight_power) for level, n_cells in statistics.n_cells.items()}
    return Classifier(hp.n_latent, hp.classifier_hidden, weights)


def standard_graphs(family: Family, dimensions: Dimensions) -> dict[str, Graph]:
    """encode, decode and, where there is a classifier, classify, for a family with methods encode and decode."""
    graphs = {
        "encode": Graph(Encode(family), ("counts",), ("latent",)),
        "decode": Graph(Decode(family), ("latent", "library", "batch"), ("expression",)),
    }
    if family.classifier is not None:
        outputs = tuple(f"probabilities_{level}" for level in dimensions.n_classes)
        graphs["classify"] = Graph(Classify(family), ("latent",), outputs)
    return graphs
