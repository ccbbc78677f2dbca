"""Variational autoencoder under any likelihood (Kingma & Welling 2014, arXiv:1312.6114; Lopez et al. 2018, doi:10.1038/s41592-018-0229-2)."""

import math
from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from training.families.family import (
    ClassifyingHyperparameters,
    Dimensions,
    Example,
    Graph,
    Hyperparameters,
    Statistics,
    build_classifier,
    standard_graphs,
)
from training.families.observing import ObservingFamily, ObservingHyperparameters, hidden_layers, input_transform
from training.likelihoods import normal_divergence
from training.networks import BatchCode


class VAEHyperparameters(ObservingHyperparameters, ClassifyingHyperparameters):
    """Hyper-parameters of `vae`."""

    classifier_weight: Annotated[float, Field(ge=0)] = 100.0
    """Weight of the cross-entropy of the labels beside the evidence bound, which is some hundred nats per cell."""

    classify_draws: bool = False
    """While training, classify a draw from the posterior and not its mean, so that classes keep apart by more than its width."""

    posterior: Literal["gaussian", "unit_variance"] = "gaussian"
    """Whether the posterior's variance is encoded, or 1."""

    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence from the prior (beta)."""

    kl_warmup_epochs: Annotated[int, Field(ge=0)] = 20
    """Epochs over which that weight rises from 0."""

    n_importance: Annotated[int, Field(gt=0)] = 1
    """Draws whose weights are averaged inside the logarithm (Burda et al. 2016, arXiv:1509.00519): a tighter bound."""

    n_monte_carlo: Annotated[int, Field(gt=0)] = 1
    """Draws (or sets of n_importance draws) whose bounds are averaged: less noise."""

    reconstruction_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the evidence bound beside the labels' cross-entropy."""

    linear_decoder: bool = False
    """Decode by one linear layer: each latent unit has a loading per gene (Svensson et al. 2020, doi:10.1093/bioinformatics/btaa169)."""

    decoder_uses_batch: bool = True
    """Give the decoder the technical batch, so that the latent need not hold it."""

    count_sum: bool = False
    """Give the decoder the library size over the largest of the training cells (scVAE)."""


@final
class VAE(ObservingFamily):
    """Gaussian posterior; the decoder alone knows the technical batch, so the encoder takes cells of any."""

    name: ClassVar[str] = "vae"
    defaults: ClassVar[type[Hyperparameters]] = VAEHyperparameters
    hyperparameters: VAEHyperparameters

    def __init__(self, hyperparameters: VAEHyperparameters, dimensions: Dimensions, statistics: Statistics) -> None:
        super().__init__(hyperparameters, dimensions, statistics)
        hp = self.hyperparameters = hyperparameters
        self.dimensions = dimensions
        self.largest_library = statistics.largest_library
        self.transform = input_transform(hp, statistics)
        self.input_dropout = nn.Dropout(hp.input_dropout)
        widths = [dimensions.n_genes, *hp.hidden]
        self.encoder = hidden_layers(hp, widths, hp.dropout)
        self.to_mean = nn.Linear(widths[-1], hp.n_latent)
        if hp.posterior == "gaussian":
            self.to_log_variance = nn.Linear(widths[-1], hp.n_latent)
        self.batch_code = BatchCode(dimensions.n_batches) if hp.decoder_uses_batch else None
        n_inputs = hp.n_latent + (dimensions.n_batches if hp.decoder_uses_batch else 0) + int(hp.count_sum)
        decoder_widths = [n_inputs, *(() if hp.linear_decoder else hp.hidden[::-1])]
        self.decoder = hidden_layers(hp, decoder_widths, 0.0)
        self.add_heads(decoder_widths[-1])
        self.classifier = build_classifier(hp, statistics)

    def encode_values(self, values: Tensor, counts: Tensor) -> Tensor:  # noqa: ARG002 - an encoder's signature
        """Transformed counts (n, n_genes) to the posterior's mean (n, n_latent)."""
        return self.to_mean(self.encoder(self.input_dropout(values)))

    def features(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """The decoder's last hidden layer."""
        return self._decoded(latent if self.batch_code is None else self.batch_code(latent, batch), library)

    def loss(self, example: Example) -> dict[str, Tensor]:
        """Evidence bound in nats per cell, and cross-entropy of the labels."""
        hp = self.hyperparameters
        features = self.encoder(self._input(example.counts))
        mean = self.to_mean(features)
        log_variance = self._log_variance(features, mean)
        warm = min(1.0, (example.epoch + 1) / hp.kl_warmup_epochs) if hp.kl_warmup_epochs else 1.0
        if hp.n_importance * hp.n_monte_carlo == 1:
            noise = torch.randn_like(mean)
            latent = mean + torch.exp(0.5 * log_variance) * noise
            decoded = self._features(latent, example, 1)
            reconstruction = self.reconstruction(decoded, example.target, example.batch).mean()
            divergence = normal_divergence(mean, log_variance).sum(dim=1).mean()
            bound = reconstruction + warm * hp.kl_weight * divergence
        else:
            latent, reconstruction, divergence, bound = self._bound(mean, log_variance, warm * hp.kl_weight, example)
        losses = {"reconstruction": reconstruction, "divergence": divergence}
        losses["loss"] = hp.reconstruction_weight * bound
        if self.classifier is not None:
            classified = latent if hp.classify_draws and self.training else mean
            losses["classification"] = self.classifier.loss(classified, example.labels, hp.label_smoothing)
            losses["loss"] = losses["loss"] + hp.classifier_weight * losses["classification"]
        return losses

    def sample_latent(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal."""
        return torch.randn(n, self.hyperparameters.n_latent, generator=generator)

    def graphs(self) -> dict[str, Graph]:
        """Encode, decode and classify."""
        return standard_graphs(self, self.dimensions)

    def gene_weight(self) -> Tensor:
        """First layer of the encoder per unit of log-normalised expression, (n_hidden, n_genes)."""
        weight = (self.encoder[0] if self.hyperparameters.hidden else self.to_mean).weight
        std = getattr(self.transform, "std", None)
        return weight if std is None else weight / std

    def _input(self, counts: Tensor) -> Tensor:
        return self.input_dropout(self.transform(counts))

    def _log_variance(self, features: Tensor, mean: Tensor) -> Tensor:
        if self.hyperparameters.posterior == "unit_variance":
            return torch.zeros_like(mean)
        return self.to_log_variance(features).clamp(-8.0, 4.0)

    def _decoded(self, coded: Tensor, library: Tensor) -> Tensor:
        if self.hyperparameters.count_sum:
            coded = torch.cat([coded, library.unsqueeze(1) / self.largest_library], dim=1)
        return self.decoder(coded)

    def _features(self, latent: Tensor, example: Example, n_draws: int) -> Tensor:
        """The decoder's features for latents (n_draws · n, n_latent); cells of unknown batches have the average code."""
        batch, library = example.batch, example.target.sum(dim=1).clamp(min=1.0)
        if n_draws > 1:
            batch, library = batch.repeat(n_draws), library.repeat(n_draws)
        return self._decoded(
            latent if self.batch_code is None else self.batch_code.known_or_average(latent, batch), library
        )

    def _bound(
        self, mean: Tensor, log_variance: Tensor, weight: float, example: Example
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One draw, and means over cells of reconstruction, divergence and importance-weighted bound.

        The weight of draw r is log p(x|z_r) + weight (log p(z_r) - log q(z_r|x)), so that with weight 1 it is Burda's.
        """
        hp = self.hyperparameters
        n_draws, n = hp.n_importance * hp.n_monte_carlo, len(mean)
        noise = torch.randn(n_draws, *mean.shape, device=mean.device)
        latents = mean + torch.exp(0.5 * log_variance) * noise
        features = self._features(latents.flatten(0, 1), example, n_draws).unflatten(0, (n_draws, n))
        reconstruction = self.reconstruction(features, example.target, example.batch)
        # The constants of both normals cancel.
        sampled = 0.5 * (latents.square() - noise.square() - log_variance).sum(dim=2)
        weights = (-reconstruction - weight * sampled).view(hp.n_monte_carlo, hp.n_importance, n)
        if hp.n_importance == 1:
            divergence = normal_divergence(mean, log_variance).sum(dim=1).mean()
            return latents[0], reconstruction.mean(), divergence, reconstruction.mean() + weight * divergence
        bound = -(torch.logsumexp(weights, dim=1) - math.log(hp.n_importance)).mean()
        return latents[0], reconstruction.mean(), sampled.mean(), bound
