"""What the decoder of atlas_vae says of counts: shares of genes, dispersion and zero inflation, under one of four likelihoods."""

from typing import Protocol

import torch
from torch import Tensor, nn

from training.families.family import Axis
from training.likelihoods import negative_binomial, squared_error

_MAX_LOG_COUNT = 15.0


class Settings(Protocol):
    """The hyper-parameters that matter here; atlas_vae documents them."""

    likelihood: str
    dispersion: str
    gate: str
    decode_library: bool
    target_sum: float


class Observation(nn.Module):
    """Heads on the decoder's features (n, n_hidden), and the likelihood that they are the parameters of."""

    def __init__(self, settings: Settings, n_hidden: int, n_genes: int, n_batches: int) -> None:
        super().__init__()
        self.settings = settings
        self.n_batches = n_batches
        self.is_of_counts = settings.likelihood in ("zinb", "nb")
        self.has_gate = settings.likelihood in ("zinb", "zero_inflated_gaussian")
        self.to_share = nn.Linear(n_hidden, n_genes)
        if settings.likelihood != "mse":
            if settings.dispersion == "gene_cell":
                self.to_log_scale = nn.Linear(n_hidden, n_genes)
            else:
                rows = (n_batches,) if settings.dispersion == "gene_batch" else ()
                self.log_scale = nn.Parameter(torch.zeros(*rows, n_genes))
        if self.has_gate:
            self.to_gate = nn.Linear(n_hidden, n_genes if settings.gate == "gene" else 1)
            nn.init.zeros_(self.to_gate.weight)
            nn.init.zeros_(self.to_gate.bias)

    def loss(self, features: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        """Negative log-likelihood in nats, (n, n_genes), of raw counts `target` with their own library sizes."""
        library = target.sum(dim=1).clamp(min=1.0)
        if self.is_of_counts:
            mean, log_theta = self._mean(features, library), self._log_scale(features, batch)
            if not self.has_gate:
                return negative_binomial(target, mean, log_theta)
            return zero_inflated(target, negative_binomial(target, mean, log_theta), self._gate(features))
        values = torch.log(target / library[:, None] * self.settings.target_sum + 1.0)
        location = self._log_value(features)
        if self.settings.likelihood == "mse":
            return squared_error(values, location)
        deviation = nn.functional.softplus(self._log_scale(features, batch)) + 1e-2
        normal = -torch.distributions.Normal(location, deviation).log_prob(values)
        return zero_inflated(values, normal, self._gate(features))

    def expected_counts(self, features: Tensor, library: Tensor, batch: Tensor) -> Tensor:  # noqa: ARG002 - a decoder's signature
        """The likelihood's mean, as counts (n, n_genes) of cells with `library` counts."""
        kept = torch.sigmoid(-self._gate(features)) if self.has_gate else torch.ones_like(library[:, None])
        if self.is_of_counts:
            return kept * self._mean(features, library)
        return (torch.exp(kept * self._log_value(features)) - 1.0) * (library[:, None] / self.settings.target_sum)

    def inflation(self, features: Tensor) -> Tensor:
        """Probability that a count is a zero of no gene's making, (n, n_genes)."""
        return torch.sigmoid(self._gate(features)).expand(-1, self.to_share.out_features)

    def axes(self, genes: Axis, batches: Axis) -> dict[str, tuple[Axis, ...]]:
        """Tensors whose shape depends on genes or batches, for `Family.axes`."""
        heads = ["to_share"] + (["to_log_scale"] if hasattr(self, "to_log_scale") else [])
        heads += ["to_gate"] if self.has_gate and self.settings.gate == "gene" else []
        axes: dict[str, tuple[Axis, ...]] = {f"{head}.weight": (genes, None) for head in heads}
        axes |= {f"{head}.bias": (genes,) for head in heads}
        if hasattr(self, "log_scale"):
            axes["log_scale"] = (batches, genes) if self.settings.dispersion == "gene_batch" else (genes,)
        return axes

    def _mean(self, features: Tensor, library: Tensor) -> Tensor:
        logits = self.to_share(features)
        if self.settings.decode_library:
            return torch.softmax(logits, dim=1) * library[:, None]
        return torch.exp(logits.clamp(-_MAX_LOG_COUNT, _MAX_LOG_COUNT))

    def _log_value(self, features: Tensor) -> Tensor:
        return torch.log(torch.softmax(self.to_share(features), dim=1) * self.settings.target_sum + 1.0)

    def _gate(self, features: Tensor) -> Tensor:
        return self.to_gate(features)

    def _log_scale(self, features: Tensor, batch: Tensor) -> Tensor:
        if self.settings.dispersion == "gene_cell":
            return self.to_log_scale(features)
        if self.settings.dispersion == "gene":
            return self.log_scale
        whole = torch.cat([self.log_scale, self.log_scale.mean(dim=0, keepdim=True)])
        return nn.functional.embedding(batch, whole)


def zero_inflated(values: Tensor, negative_log_likelihood: Tensor, gate_logits: Tensor) -> Tensor:
    """Negative log-likelihood of a mixture with zero, in log space: sigmoid(gate) of a zero, else as given.

    Args:
        values: (n, n_genes), zero where the mixture's second part may explain them.
        negative_log_likelihood: of `values` without inflation.
        gate_logits: (n, n_genes) or (n, 1).
    """
    softplus = nn.functional.softplus(gate_logits)
    zero = torch.logaddexp(gate_logits.expand_as(values), -negative_log_likelihood) - softplus
    return -torch.where(values == 0, zero, -negative_log_likelihood - softplus)
