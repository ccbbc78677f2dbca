"""Building blocks of the families. All tensors are float32 unless said otherwise; n is the number of cells."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "leaky_relu", "softplus"]


def mlp(
    sizes: Sequence[int],
    dropout: float,
    layer_norm: bool,
    batch_norm: bool = False,
    activation: Activation = "relu",
    softplus_beta: float | None = None,
) -> nn.Sequential:
    """Linear layers between `sizes`, each followed by (a norm,) an activation (and dropout).

    Args:
        sizes: widths, first the input's.
        dropout: share of units dropped while training.
        layer_norm: whether each layer is normalised within a cell (Ba et al. 2016, arXiv:1607.06450), which is the same function while
            training and serving.
        batch_norm: whether each layer is normalised over the minibatch (Ioffe & Szegedy 2015, arXiv:1502.03167), with scVI's constants.
        activation: after the norm.
        softplus_beta: sharpness of softplus; None for the layer's own width, as in the published expression-saliency autoencoder.
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers.append(nn.Linear(n_in, n_out))
        if layer_norm:
            layers.append(nn.LayerNorm(n_out))
        if batch_norm:
            layers.append(nn.BatchNorm1d(n_out, eps=1e-3, momentum=0.01))
        layers.append(activate(activation, n_out if softplus_beta is None else softplus_beta))
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def activate(activation: Activation, softplus_beta: float) -> nn.Module:
    """The activation as a module."""
    if activation == "softplus":
        return nn.Softplus(softplus_beta)
    return nn.ReLU() if activation == "relu" else nn.LeakyReLU()


class InputTransform(nn.Module, ABC):
    """What the encoder sees of raw counts; it is part of the graph, so that raw counts go in.

    It has two steps: `value`, which knows one count and its cell's library and leaves zero at zero, so that it can be taken of the counts
    that are not zero alone, and `finish`, which is taken of all genes.
    """

    costly_of: ClassVar[tuple[str, ...]] = ()
    """What `value` depends on, "count" and perhaps "library", where it takes long enough to leave out the zeros; else empty."""

    def forward(self, counts: Tensor) -> Tensor:
        """Raw counts (n, n_genes) to the same shape."""
        return self.finish(self.value(counts, counts.sum(dim=1, keepdim=True)))

    @abstractmethod
    def value(self, counts: Tensor, library: Tensor | None) -> Tensor:
        """Counts of any shape, and the counts of their cells, to the same shape; 0 becomes 0."""

    def finish(self, values: Tensor) -> Tensor:
        """Values (n, n_genes) to what the first layer is given."""
        return values

    @abstractmethod
    def expected_counts(self, values: Tensor, library: Tensor) -> Tensor:
        """Undo it: counts, (n, n_genes), not negative, of cells with `library` counts, (n,)."""


class LogNormalise(InputTransform):
    """ln(1 + counts per `target_sum`), if asked scaled per gene."""

    costly_of = ("count", "library")

    def __init__(self, target_sum: float, mean: Tensor | None, std: Tensor | None, clip: float | None) -> None:
        """Prepare the transform.

        Args:
            target_sum: counts per cell after normalisation.
            mean: of each gene over training cells, shape (n_genes,), subtracted; None to leave the location as it is.
            std: of each gene, shape (n_genes,), divided by; None to leave the scale as it is.
            clip: largest absolute value after scaling; None for no bound.
        """
        super().__init__()
        self.target_sum, self.clip = float(target_sum), clip
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def value(self, counts: Tensor, library: Tensor | None) -> Tensor:
        """ln(1 + counts per `target_sum`). A cell without counts becomes what zeros become."""
        assert library is not None, "see `costly_of`"
        return torch.log(counts / library.clamp(min=1.0) * self.target_sum + 1.0)

    def finish(self, values: Tensor) -> Tensor:
        """Scaled per gene and bounded, (n, n_genes)."""
        if self.mean is not None:
            values = values - self.mean
        if self.std is not None:
            values = values / self.std
        return values if self.clip is None else values.clamp(-self.clip, self.clip)

    def expected_counts(self, values: Tensor, library: Tensor) -> Tensor:
        """Counts, (n, n_genes), not negative, of cells with `library` counts, (n,)."""
        if self.std is not None:
            values = values * self.std
        if self.mean is not None:
            values = values + self.mean
        # The bound is e^20 counts; it keeps a far extrapolation finite.
        return (torch.exp(values.clamp(0.0, 20.0)) - 1.0) * (library.unsqueeze(1) / self.target_sum)


class LogCounts(InputTransform):
    """ln(1 + counts), without normalisation: depth stays in it."""

    costly_of = ("count",)

    def __init__(self, clip: float | None) -> None:
        super().__init__()
        self.clip = clip

    def value(self, counts: Tensor, library: Tensor | None) -> Tensor:  # noqa: ARG002 - depth stays in it
        """ln(1 + counts), at most `clip`."""
        values = torch.log(counts + 1.0)
        return values if self.clip is None else values.clamp(max=self.clip)

    def expected_counts(self, values: Tensor, library: Tensor) -> Tensor:  # noqa: ARG002 - depth is in the values
        """exp(values) - 1, (n, n_genes)."""
        return torch.exp(values.clamp(0.0, 20.0)) - 1.0


class RawCounts(InputTransform):
    """Counts as they are, as scVAE has them."""

    def __init__(self, clip: float | None) -> None:
        super().__init__()
        self.clip = clip

    def value(self, counts: Tensor, library: Tensor | None) -> Tensor:  # noqa: ARG002 - depth stays in it
        """Counts, at most `clip`."""
        return counts if self.clip is None else counts.clamp(max=self.clip)

    def expected_counts(self, values: Tensor, library: Tensor) -> Tensor:  # noqa: ARG002 - depth is in the values
        """The values themselves where they are not negative, (n, n_genes)."""
        return values.clamp(min=0.0)


class Binarise(InputTransform):
    """Whether a gene has any count."""

    def value(self, counts: Tensor, library: Tensor | None) -> Tensor:  # noqa: ARG002 - there is no depth
        """Counts to 0 and 1."""
        return (counts > 0).to(counts)

    def expected_counts(self, values: Tensor, library: Tensor) -> Tensor:  # noqa: ARG002 - there is no depth
        """Values between 0 and 1, (n, n_genes)."""
        return values.clamp(0.0, 1.0)


def class_weights(n_cells: Tensor, power: float) -> Tensor:
    """Weights by class, from the number of training cells of each: (mean number / number) ** power, 0 for an absent class."""
    present = n_cells > 0
    mean = n_cells.sum() / present.sum().clamp(min=1)
    return torch.where(present, (mean / n_cells.clamp(min=1)) ** power, torch.zeros_like(n_cells))


class BatchCode(nn.Module):
    """Appends the technical batch, one-hot, to the latent."""

    def __init__(self, n_batches: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.eye(n_batches), persistent=False)

    def forward(self, latent: Tensor, batch: Tensor) -> Tensor:
        """Latent (n, n_latent) and batch int64 (n,) to (n, n_latent + n_batches)."""
        return torch.cat([latent, nn.functional.embedding(batch, self.codes)], dim=1)

    def known_or_average(self, latent: Tensor, batch: Tensor) -> Tensor:
        """As `forward`, with the mean of all codes for a batch of -1, which the model does not know."""
        codes = nn.functional.embedding(batch.clamp(min=0), self.codes)
        return torch.cat([latent, torch.where(batch[:, None] < 0, self.codes.mean(dim=0), codes)], dim=1)


class Classifier(nn.Module):
    """One head per label level on the latent."""

    def __init__(self, n_latent: int, hidden: Sequence[int], class_weight: Mapping[str, Tensor]) -> None:
        """Build the heads.

        Args:
            n_latent: width of the latent.
            hidden: widths of layers that the heads share.
            class_weight: by label level, weight of each class in the loss, shape (n_classes,).
        """
        super().__init__()
        width = hidden[-1] if hidden else n_latent
        self.trunk = mlp([n_latent, *hidden], dropout=0.0, layer_norm=False)
        self.heads = nn.ModuleDict({level: nn.Linear(width, len(weight)) for level, weight in class_weight.items()})
        self._class_weight = list(class_weight.values())

    def forward(self, latent: Tensor) -> list[Tensor]:
        """Latent (n, n_latent) to logits (n, n_classes) per level."""
        features = self.trunk(latent)
        return [head(features) for head in self.heads.values()]

    def loss(self, latent: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Mean cross-entropy of labelled cells in nats, summed over levels; labels int64 (n, n_levels), -1 counts for nothing."""
        total = latent.new_zeros(())
        for level, logits in enumerate(self(latent)):
            target, weight = labels[:, level], self._class_weight[level].to(latent)
            summed = nn.functional.cross_entropy(
                logits, target, weight, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
            )
            total = total + summed / weight[target.clamp(min=0)].masked_fill(target < 0, 0.0).sum().clamp(min=1e-6)
        return total
