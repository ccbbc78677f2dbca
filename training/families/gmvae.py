"""Gaussian-mixture variational autoencoder, as scVAE's (Grønbech et al. 2020, doi:10.1093/bioinformatics/btaa293): it clusters while it embeds.

All components are computed as one batch of n_cells · n_clusters rows. scVAE runs them one after the other, each normalised by its own
minibatch, which subtracts the component's offset again: its posterior does not depend on the component while training.
"""

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from training.families.family import Dimensions, Example, Graph, Hyperparameters, Statistics, standard_graphs
from training.families.observing import ObservingFamily, ObservingHyperparameters, hidden_layers, input_transform
from training.networks import BatchCode

CLUSTER = "cluster"
"""Name of the label level that holds the components themselves."""

_MIN_SCALE = 1e-3


class GMVAEHyperparameters(ObservingHyperparameters):
    """Hyper-parameters of `gmvae`."""

    hidden: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (100, 100)
    n_latent: Annotated[int, Field(gt=0)] = 10
    n_clusters: Annotated[int, Field(gt=1)] | None = None
    """Components of the mixture; none: as many as the first label level has classes."""

    covariance: Literal["diagonal", "full"] = "diagonal"
    """Of the components and of the posteriors."""

    prior: Literal["uniform", "inferred", "custom", "learned"] = "uniform"
    """Probabilities of the components: equal, the shares of the first label level's classes, given, or trained."""

    prior_probabilities: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """With a custom prior."""

    free_nats: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the prior's entropy that the divergence of components costs nothing below, so that components do not vanish."""

    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of both divergences (beta)."""

    kl_warmup_epochs: Annotated[int, Field(ge=0)] = 20
    """Epochs over which the weight of the latent's divergence rises from 0. That of the components counts from the first epoch: scVAE warms
    up both, and then one component takes all cells before there is a price for it."""

    decoder_uses_batch: bool = True
    """Give the decoder the technical batch, so that the latent need not hold it."""

    @model_validator(mode="after")
    def _check_prior(self) -> Self:
        if (self.prior == "custom") != (self.prior_probabilities is not None):
            raise ValueError("prior_probabilities go with prior: custom, and only with it")
        if self.prior_probabilities is not None:
            if self.n_clusters is not None and len(self.prior_probabilities) != self.n_clusters:
                raise ValueError(
                    f"prior_probabilities are {len(self.prior_probabilities)} and n_clusters is {self.n_clusters}"
                )
            if abs(sum(self.prior_probabilities) - 1.0) > 1e-6:
                raise ValueError(f"prior_probabilities sum to {sum(self.prior_probabilities):g} and not to 1")
        return self


class ClassifyCounts(nn.Module):
    """counts (n, n_genes) → probabilities per label level, and of the components."""

    def __init__(self, family: "GMVAE") -> None:
        super().__init__()
        self.family = family

    def forward(self, counts: Tensor) -> tuple[Tensor, ...]:
        """Class probabilities (n, n_classes), one tensor per level, and those of the clusters (n, n_clusters)."""
        clusters = self.family.clusters(counts)
        return (*(clusters @ naming for naming in self.family.namings()), clusters)


@final
class GMVAE(ObservingFamily):
    """q(y|x), q(z|x,y), p(z|y) and p(x|z); a cell's latent is the mean of its components' means, weighted by q(y|x)."""

    name: ClassVar[str] = "gmvae"
    defaults: ClassVar[type[Hyperparameters]] = GMVAEHyperparameters
    hyperparameters: GMVAEHyperparameters

    def __init__(self, hyperparameters: GMVAEHyperparameters, dimensions: Dimensions, statistics: Statistics) -> None:
        super().__init__(hyperparameters, dimensions, statistics)
        hp = self.hyperparameters = hyperparameters
        self.dimensions = dimensions
        n_clusters = self.n_clusters = _n_clusters(hp, dimensions)
        if CLUSTER in dimensions.n_classes:
            raise ValueError(
                f"A label level cannot be called '{CLUSTER}': gmvae has one of that name. Rename the column."
            )
        self.own_levels = {CLUSTER: tuple(str(k) for k in range(n_clusters))}
        self.transform = input_transform(hp, statistics)
        self.input_dropout = nn.Dropout(hp.input_dropout)
        self.mixture = hidden_layers(hp, [dimensions.n_genes, *hp.hidden], hp.dropout)
        self.to_cluster = nn.Linear(hp.hidden[-1], n_clusters)
        # The first layer's last columns are the components': see _components.
        self.component = hidden_layers(hp, [dimensions.n_genes + n_clusters, *hp.hidden], hp.dropout)
        n_scales = hp.n_latent if hp.covariance == "diagonal" else hp.n_latent * (hp.n_latent + 1) // 2
        self.to_mean = nn.Linear(hp.hidden[-1], hp.n_latent)
        self.to_scale = nn.Linear(hp.hidden[-1], n_scales)
        self.prior_mean = nn.Parameter(torch.randn(n_clusters, hp.n_latent))
        self.prior_scale = nn.Parameter(torch.zeros(n_clusters, n_scales))
        prior = _prior(hp, n_clusters, statistics)
        if hp.prior == "learned":
            self.prior_logits = nn.Parameter(prior)
        else:
            self.register_buffer("prior_logits", prior)
        self.batch_code = BatchCode(dimensions.n_batches) if hp.decoder_uses_batch else None
        n_inputs = hp.n_latent + (dimensions.n_batches if hp.decoder_uses_batch else 0)
        self.decoder = hidden_layers(hp, [n_inputs, *hp.hidden[::-1]], 0.0)
        self.add_heads(hp.hidden[0])
        for i, n_classes in enumerate(dimensions.n_classes.values()):
            self.register_buffer(f"naming_{i}", torch.full((n_clusters, n_classes), 1.0 / n_classes))

    def clusters(self, counts: Tensor) -> Tensor:
        """q(y|x), (n, n_clusters), of raw counts (n, n_genes)."""
        return torch.softmax(self._logits(self.input_dropout(self.transform(counts))), dim=1)

    def encode_values(self, values: Tensor, counts: Tensor) -> Tensor:
        """Transformed counts (n, n_genes) to the mean of q(z|x), (n, n_latent)."""
        values = self.input_dropout(values)
        means = self.to_mean(self._components(values)).view(counts.shape[0], self.n_clusters, -1)
        return (torch.softmax(self._logits(values), dim=1).unsqueeze(2) * means).sum(dim=1)

    def class_scores(self, values: Tensor, latent: Tensor) -> list[Tensor]:  # noqa: ARG002 - the clusters are none of its functions
        """Logarithms of the probabilities of the classes and of the clusters."""
        clusters = torch.log_softmax(self._logits(self.input_dropout(values)), dim=1)
        named = [torch.logsumexp(clusters.unsqueeze(2) + torch.log(naming), dim=1) for naming in self.namings()]
        return [*named, clusters]

    def features(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:  # noqa: ARG002 - a decoder's signature
        """The decoder's last hidden layer."""
        return self.decoder(latent if self.batch_code is None else self.batch_code(latent, batch))

    def loss(self, example: Example) -> dict[str, Tensor]:
        """Evidence bound in nats per cell: the expectation over components is exact, that over the latent is one draw of each."""
        hp, n, k = self.hyperparameters, len(example.counts), self.n_clusters
        values = self.input_dropout(self.transform(example.counts))
        log_q = torch.log_softmax(self._logits(values), dim=1)
        q, features = log_q.exp(), self._components(values)
        mean = self.to_mean(features).view(n, k, -1)
        scale = self._scale(self.to_scale(features)).view(n, k, *self._scale_shape)
        noise = torch.randn_like(mean)
        latent = mean + (scale * noise if hp.covariance == "diagonal" else (scale @ noise.unsqueeze(3)).squeeze(3))
        reconstruction = (q * self._reconstruction(latent, example)).sum(dim=1).mean()
        of_latent = (q * _divergence(mean, scale, self.prior_mean, self._scale(self.prior_scale))).sum(dim=1).mean()
        log_prior = torch.log_softmax(self.prior_logits, dim=0)
        of_cluster = (q * (log_q - log_prior)).sum(dim=1).mean()
        warm = min(1.0, (example.epoch + 1) / hp.kl_warmup_epochs) if hp.kl_warmup_epochs else 1.0
        counted = of_cluster
        if hp.free_nats and self.training:
            entropy = -(log_prior.exp() * log_prior).sum().detach()
            counted = of_cluster.clamp(min=hp.free_nats * float(entropy))
        return {
            "reconstruction": reconstruction,
            "divergence": of_latent,
            "cluster_divergence": of_cluster,
            "loss": reconstruction + hp.kl_weight * (warm * of_latent + counted),
        }

    def conclude(self, examples: Iterable[Example]) -> None:
        """Name the clusters by training labels only: P(class | cluster), with one cell's weight of the classes' own shares added."""
        totals = [torch.zeros_like(naming) for naming in self.namings()]
        with torch.no_grad():
            for example in examples:
                q = self.clusters(example.counts)
                for i, labels in enumerate(example.labels.T):
                    known = labels >= 0
                    totals[i] += q[known].T @ nn.functional.one_hot(labels[known], totals[i].shape[1]).to(q)
        for naming, total in zip(self.namings(), totals, strict=True):
            if total.sum() > 0:
                shares = total + total.sum(dim=0, keepdim=True) / total.sum()
                naming.copy_(shares / shares.sum(dim=1, keepdim=True))

    def namings(self) -> list[Tensor]:
        """P(class | cluster) by label level, each (n_clusters, n_classes)."""
        return [self.get_buffer(f"naming_{i}") for i in range(len(self.dimensions.n_classes))]

    def sample_latent(self, n: int, generator: torch.Generator) -> Tensor:
        """A component by the prior, and a latent of it."""
        hp = self.hyperparameters
        chosen = torch.multinomial(torch.softmax(self.prior_logits, dim=0), n, replacement=True, generator=generator)
        noise = torch.randn(n, hp.n_latent, generator=generator)
        scale = self._scale(self.prior_scale)[chosen]
        noise = scale * noise if hp.covariance == "diagonal" else (scale @ noise.unsqueeze(2)).squeeze(2)
        return self.prior_mean[chosen] + noise

    def graphs(self) -> dict[str, Graph]:
        """Encode, decode, and classify, which takes counts: the clusters are no function of the latent."""
        levels = (*self.dimensions.n_classes, CLUSTER)
        outputs = tuple(f"probabilities_{level}" for level in levels)
        classify = Graph(ClassifyCounts(self), ("counts",), outputs)
        return {**standard_graphs(self, self.dimensions), "classify": classify}

    def gene_weight(self) -> Tensor:
        """First layer of q(z|x,y) per unit of log-normalised expression, (n_hidden, n_genes)."""
        weight = self.component[0].weight[:, : self.dimensions.n_genes]
        std = getattr(self.transform, "std", None)
        return weight if std is None else weight / std

    @property
    def _scale_shape(self) -> tuple[int, ...]:
        n_latent = self.hyperparameters.n_latent
        return (n_latent,) if self.hyperparameters.covariance == "diagonal" else (n_latent, n_latent)

    def _logits(self, values: Tensor) -> Tensor:
        return self.to_cluster(self.mixture(values))

    def _components(self, values: Tensor) -> Tensor:
        """Features (n · n_clusters, n_hidden) of every cell in every component; what depends on the cell alone is computed once."""
        first, n_genes = self.component[0], self.dimensions.n_genes
        of_cell = nn.functional.linear(values, first.weight[:, :n_genes], first.bias)
        both = of_cell.unsqueeze(1) + first.weight[:, n_genes:].T
        return self.component[1:](both.flatten(0, 1))

    def _scale(self, raw: Tensor) -> Tensor:
        """Standard deviations (…, n_latent), or lower triangles (…, n_latent, n_latent) with them on the diagonal."""
        if self.hyperparameters.covariance == "diagonal":
            return _positive(raw)
        n_latent = self.hyperparameters.n_latent
        rows, columns = torch.tril_indices(n_latent, n_latent)
        triangle = raw.new_zeros(*raw.shape[:-1], n_latent, n_latent)
        triangle[..., rows, columns] = raw
        return torch.tril(triangle, -1) + torch.diag_embed(_positive(torch.diagonal(triangle, dim1=-2, dim2=-1)))

    def _reconstruction(self, latent: Tensor, example: Example) -> Tensor:
        """Negative log-likelihood (n, n_clusters) of each cell for its latents (n, n_clusters, n_latent)."""
        batch = example.batch.repeat(self.n_clusters)
        rows = latent.transpose(0, 1).flatten(0, 1)
        coded = rows if self.batch_code is None else self.batch_code.known_or_average(rows, batch)
        features = self.decoder(coded).unflatten(0, (self.n_clusters, len(latent)))
        return self.reconstruction(features, example.target, example.batch).T


def _n_clusters(hyperparameters: GMVAEHyperparameters, dimensions: Dimensions) -> int:
    if hyperparameters.n_clusters is not None:
        return hyperparameters.n_clusters
    n_classes = next(iter(dimensions.n_classes.values()), 0)
    if n_classes < 2:
        raise ValueError(
            "gmvae needs n_clusters where there is no label level of two classes or more to take their number from."
        )
    return n_classes


def _prior(hyperparameters: GMVAEHyperparameters, n_clusters: int, statistics: Statistics) -> Tensor:
    """Logarithms of the components' probabilities, (n_clusters,), up to a constant."""
    hp = hyperparameters
    if hp.prior == "custom":
        assert hp.prior_probabilities is not None
        found = torch.tensor(hp.prior_probabilities)
    elif hp.prior == "inferred":
        found = next(iter(statistics.n_cells.values()), torch.zeros(0)) + 1.0
    else:
        found = torch.ones(n_clusters)
    if len(found) != n_clusters:
        raise ValueError(
            f"The {hp.prior} prior has {len(found)} probabilities and the mixture {n_clusters} components."
        )
    return torch.log(found)


def _positive(raw: Tensor) -> Tensor:
    return torch.sqrt(nn.functional.softplus(raw)) + _MIN_SCALE


def _divergence(mean: Tensor, scale: Tensor, prior_mean: Tensor, prior_scale: Tensor) -> Tensor:
    """Kullback-Leibler divergence of q(z|x,y) from p(z|y), (n, n_clusters).

    Args:
        mean: (n, n_clusters, n_latent).
        scale: (n, n_clusters, n_latent), or lower triangles (n, n_clusters, n_latent, n_latent).
        prior_mean: (n_clusters, n_latent).
        prior_scale: as `scale`, without n.
    """
    if scale.ndim == mean.ndim:
        return kl_divergence(
            Normal(mean, scale, validate_args=False), Normal(prior_mean, prior_scale, validate_args=False)
        ).sum(dim=2)
    return kl_divergence(
        MultivariateNormal(mean, scale_tril=scale, validate_args=False),
        MultivariateNormal(prior_mean.expand_as(mean), scale_tril=prior_scale.expand_as(scale), validate_args=False),
    )
