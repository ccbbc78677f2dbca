"""A family whose decoder explains counts by one of the likelihoods: the heads, the distribution and the expected counts."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import Distribution

from training.families.family import Axis, Dimensions, Family, Hyperparameters, Statistics
from training.likelihoods import (
    LIKELIHOODS,
    LOGITS,
    MAX_MULTIVARIATE_GENES,
    Explains,
    Head,
    Likelihood,
    LikelihoodName,
    Piecewise,
)
from training.networks import Activation, Binarise, InputTransform, LogCounts, LogNormalise, RawCounts, mlp

_MAX_LOG_COUNT = 15.0


class ObservingHyperparameters(Hyperparameters):
    """What families with a likelihood have beside the rest. docs/likelihoods.md has the equations."""

    input: Literal["log_normalised", "log_counts", "counts", "binary"] = "log_normalised"
    """What the encoder sees: ln(1 + counts per target_sum), ln(1 + counts), counts as they are, or whether there are any."""

    batch_norm: bool = False
    """Normalise hidden layers over the minibatch: faster to train, but then a cell's training depends on its company."""

    activation: Activation = "relu"
    """Of hidden layers."""

    softplus_beta: Annotated[float, Field(gt=0)] | None = None
    """Sharpness where the activation is softplus; none: the layer's width, as published for the expression-saliency autoencoder."""

    likelihood: LikelihoodName = "negative_binomial"
    """What the decoder's heads are parameters of."""

    dispersion: Literal["gene", "gene_batch", "gene_cell"] = "gene"
    """What the parameters of width (inverse dispersion, deviation) are a function of."""

    gate: Literal["gene", "cell"] = "gene"
    """Whether zero inflation is decoded for each gene, or once for a cell."""

    decode_library: bool = True
    """The decoder gives shares, and the cell's own library the depth: mean counts are share times library, and continuous likelihoods
    explain ln(1 + counts per target_sum). Off: raw counts are explained, and the decoder must learn the depth from the latent."""

    mean_activation: Literal["exp", "softplus"] = "exp"
    """With decode_library off: what makes the mean of a count positive."""

    n_components: Annotated[int, Field(gt=1)] = 3
    """Of gaussian_mixture."""

    k_max: Annotated[int, Field(gt=0)] | None = None
    """Counts below have probabilities of their own, and the likelihood explains the rest (scVAE's piecewise categorical)."""

    @model_validator(mode="after")
    def _check_likelihood(self) -> Self:
        likelihood = LIKELIHOODS[self.likelihood]
        if self.scale and self.input != "log_normalised":
            raise ValueError(
                f"scale cannot be had with input '{self.input}': means and deviations are those of log-normalised counts"
            )
        if LOGITS in likelihood.heads:
            if self.k_max is None:
                raise ValueError(f"likelihood '{self.likelihood}' needs k_max, its largest count")
        elif self.k_max is not None:
            if self.likelihood in ("bernoulli", "constrained_poisson", "mse") or likelihood.is_inflated:
                raise ValueError(f"k_max cannot be had with '{self.likelihood}', which has another say on small counts")
            if self.decode_library:
                raise ValueError(
                    "k_max needs decode_library: false, since a share of the library is not a mean of counts above k_max"
                )
        if likelihood.is_constrained and not self.decode_library:
            raise ValueError(
                f"decode_library cannot be off with '{self.likelihood}', whose mean is a share of the library"
            )
        return self


def input_transform(hyperparameters: ObservingHyperparameters, statistics: Statistics) -> InputTransform:
    """The input's transform as the hyper-parameters ask for it."""
    hp = hyperparameters
    if hp.input == "log_counts":
        return LogCounts(hp.clip)
    if hp.input == "counts":
        return RawCounts(hp.clip)
    if hp.input == "binary":
        return Binarise()
    mean, std = (statistics.mean, statistics.std.clamp(min=hp.min_std)) if hp.scale else (None, None)
    return LogNormalise(hp.target_sum, mean, std, hp.clip)


def hidden_layers(hyperparameters: ObservingHyperparameters, sizes: Sequence[int], dropout: float) -> nn.Sequential:
    """Layers between `sizes` as the hyper-parameters ask for them."""
    hp = hyperparameters
    return mlp(sizes, dropout, hp.layer_norm, hp.batch_norm, hp.activation, hp.softplus_beta)


class ObservingFamily(Family):
    """Heads are attributes `to_<name>` where decoded, and parameters `<name>` where they depend on the gene (and batch) only."""

    hyperparameters: ObservingHyperparameters
    dimensions: Dimensions

    @abstractmethod
    def features(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """The decoder's last hidden layer (n, n_features) for latents (n, n_latent), libraries (n,) and batches (n,)."""

    @property
    def likelihood(self) -> Likelihood:
        """The chosen one."""
        return LIKELIHOODS[self.hyperparameters.likelihood]

    @property
    def explains(self) -> Explains:
        """What the likelihood explains; with free depth `values` are raw counts."""
        return self.likelihood.explains

    def observed(self, counts: Tensor) -> Tensor:
        """What the likelihood explains of raw counts (n, n_genes), of the same shape."""
        if self.explains == "detection":
            return (counts > 0).to(counts)
        if self.explains == "counts" or not self.hyperparameters.decode_library:
            return counts
        library = counts.sum(dim=1, keepdim=True).clamp(min=1.0)
        return torch.log(counts / library * self.hyperparameters.target_sum + 1.0)

    def distribution(self, latent: Tensor, library: Tensor, batch: Tensor) -> Distribution:
        """Of what is observed of cells with these latents (n, n_latent), libraries (n,) and batches int64 (n,)."""
        return self.explain(self.features(latent, library, batch), library, batch)

    def decode(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """Expected counts (n, n_genes); for bernoulli the probability that a gene is detected."""
        return self.expected_counts(self.features(latent, library, batch), library, batch)

    def expected_counts(self, features: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """The likelihood's mean, as counts (n, n_genes) of cells with `library` counts."""
        mean = self.explain(features, library, batch).mean
        if self.explains == "values" and self.hyperparameters.decode_library:
            # e^20 counts bound a far extrapolation.
            return (torch.exp(mean.clamp(0.0, 20.0)) - 1.0) * (library[:, None] / self.hyperparameters.target_sum)
        return mean.clamp(min=0.0) if self.explains == "values" else mean

    def reconstruction(self, features: Tensor, target: Tensor, batch: Tensor) -> Tensor:
        """Negative log-likelihood in nats of raw counts `target` (n, n_genes) with their own library sizes.

        Args:
            features: (n, n_features), or (n_draws, n, n_features) for several latents of each cell: what depends on the counts alone is
                computed once.
            target: raw counts.
            batch: int64 (n,).

        Returns:
            (n,), or (n_draws, n).
        """
        library = target.sum(dim=1).clamp(min=1.0)
        return -self.explain(features, library, batch).log_prob(self.observed(target)).sum(dim=-1)

    def inflation(self, features: Tensor) -> Tensor:
        """Probability that a count is a zero of no gene's making, (n, n_genes)."""
        return torch.sigmoid(self.to_gate(features)).expand(-1, self.dimensions.n_genes)

    def add_heads(self, n_features: int) -> None:
        """Make the heads on a decoder that gives `n_features`; `hyperparameters` and `dimensions` must be set.

        Raises:
            ValueError: a full covariance of too many genes is asked for.
        """
        hp, n_genes = self.hyperparameters, self.dimensions.n_genes
        if hp.likelihood == "multivariate_gaussian" and n_genes > MAX_MULTIVARIATE_GENES:
            raise ValueError(
                f"likelihood 'multivariate_gaussian' takes {MAX_MULTIVARIATE_GENES} genes at most, and there are {n_genes:,}. "
                "Lower genes.n_genes, or take 'gaussian'."
            )
        if self.likelihood.has_location:
            self.to_share = nn.Linear(n_features, n_genes)
        for head in self._heads:
            width = self._width(head)
            if head.is_dispersion and hp.dispersion != "gene_cell":
                rows = (self.dimensions.n_batches,) if hp.dispersion == "gene_batch" else ()
                setattr(self, head.name, nn.Parameter(torch.zeros(*rows, width)))
                continue
            layer = nn.Linear(n_features, 1 if head.name == "gate" and hp.gate == "cell" else width)
            if head.name == "gate":
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
            setattr(self, f"to_{head.name}", layer)

    def explain(self, features: Tensor, library: Tensor, batch: Tensor) -> Distribution:
        """The distribution that the heads on `features` (n, n_features) are the parameters of."""
        heads = {head.name: self._head(head, features, batch) for head in self._heads}
        location = self._location(features, library) if self.likelihood.has_location else features
        made = self.likelihood.build(location, heads)
        return Piecewise(made, heads[LOGITS.name]) if self._is_piecewise else made

    def head_axes(self, genes: Axis, batches: Axis) -> dict[str, tuple[Axis, ...]] | None:
        """Tensors of the heads whose shape depends on genes or batches, for `Family.axes`; None where one has no row for each gene."""
        hp = self.hyperparameters
        if any(head.width != "gene" for head in self._heads):
            return None
        layers = ["to_share"] if self.likelihood.has_location else []
        axes: dict[str, tuple[Axis, ...]] = {}
        for head in self._heads:
            if head.is_dispersion and hp.dispersion != "gene_cell":
                axes[head.name] = (batches, genes) if hp.dispersion == "gene_batch" else (genes,)
            elif not (head.name == "gate" and hp.gate == "cell"):
                layers.append(f"to_{head.name}")
        axes |= {f"{layer}.weight": (genes, None) for layer in layers}
        return axes | {f"{layer}.bias": (genes,) for layer in layers}

    @property
    def _is_piecewise(self) -> bool:
        return self.hyperparameters.k_max is not None and LOGITS not in self.likelihood.heads

    @property
    def _heads(self) -> tuple[Head, ...]:
        return self.likelihood.heads + ((LOGITS,) if self._is_piecewise else ())

    def _width(self, head: Head) -> int:
        n_genes = self.dimensions.n_genes
        if head.width == "components":
            return n_genes * self.hyperparameters.n_components
        if head.width == "k_max":
            assert self.hyperparameters.k_max is not None
            return n_genes * (self.hyperparameters.k_max + 1)
        return n_genes * (n_genes + 1) // 2 if head.width == "triangle" else n_genes

    def _head(self, head: Head, features: Tensor, batch: Tensor) -> Tensor:
        if not head.is_dispersion or self.hyperparameters.dispersion == "gene_cell":
            found = self.get_submodule(f"to_{head.name}")(features)
        elif self.hyperparameters.dispersion == "gene":
            found = self.get_parameter(head.name)
        else:
            table = self.get_parameter(head.name)
            # The last row is the average batch, which stands for those that the model does not know.
            whole = torch.cat([table, table.mean(dim=0, keepdim=True)])
            found = nn.functional.embedding(torch.where(batch < 0, torch.full_like(batch, len(table)), batch), whole)
        return found.unflatten(-1, (self.dimensions.n_genes, -1)) if head.width in ("components", "k_max") else found

    def _location(self, features: Tensor, library: Tensor) -> Tensor:
        hp, decoded = self.hyperparameters, self.to_share(features)
        if hp.decode_library:
            share = torch.softmax(decoded, dim=decoded.ndim - 1)
            if self.explains == "values":
                return torch.log(share * hp.target_sum + 1.0)
            mean = share * library.unsqueeze(1)
            # The probability that a Poisson count of this mean is not zero, as a logit.
            return mean + torch.log(-torch.expm1(-mean).clamp(max=-1e-12)) if self.explains == "detection" else mean
        if self.explains == "counts" or self.likelihood.is_positive:
            if hp.mean_activation == "softplus":
                return nn.functional.softplus(decoded) + 1e-8
            return torch.exp(decoded.clamp(-_MAX_LOG_COUNT, _MAX_LOG_COUNT))
        return decoded
