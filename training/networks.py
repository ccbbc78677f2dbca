"""Building blocks of the families. All tensors are float32 unless said otherwise; n is the number of cells."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int], dropout: float, layer_norm: bool) -> nn.Sequential:
    """Linear layers between `sizes`, each followed by (LayerNorm,) ReLU (and dropout).

    LayerNorm and not BatchNorm: it works on one cell, so training and serving compute the same function.

    Args:
        sizes: widths, first the input's.
        dropout: share of units dropped while training.
        layer_norm: whether each layer is normalised (Ba et al. 2016, arXiv:1607.06450).
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers.append(nn.Linear(n_in, n_out))
        if layer_norm:
            layers.append(nn.LayerNorm(n_out))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


class LogNormalise(nn.Module):
    """ln(1 + counts per `target_sum`), if asked scaled per gene; it is part of the graph, so that raw counts go in."""

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

    def forward(self, counts: Tensor) -> Tensor:
        """Transform raw counts, shape (n, n_genes), to the same shape. A cell without counts becomes what zeros become."""
        library = counts.sum(dim=1, keepdim=True).clamp(min=1.0)
        values = torch.log(counts / library * self.target_sum + 1.0)
        if self.mean is not None:
            values = values - self.mean
        if self.std is not None:
            values = values / self.std
        return values if self.clip is None else values.clamp(-self.clip, self.clip)

    def expected_counts(self, values: Tensor, library: Tensor) -> Tensor:
        """Undo the transform: counts, shape (n, n_genes), not negative, of cells with `library` counts, shape (n,)."""
        if self.std is not None:
            values = values * self.std
        if self.mean is not None:
            values = values + self.mean
        # The bound is e^20 counts; it keeps a far extrapolation finite.
        return (torch.exp(values.clamp(0.0, 20.0)) - 1.0) * (library.unsqueeze(1) / self.target_sum)


class LogCounts(nn.Module):
    """ln(1 + counts), without normalisation: depth stays in it."""

    def __init__(self, clip: float | None) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, counts: Tensor) -> Tensor:
        """Raw counts (n, n_genes) to the same shape, at most `clip`."""
        values = torch.log(counts + 1.0)
        return values if self.clip is None else values.clamp(max=self.clip)


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
