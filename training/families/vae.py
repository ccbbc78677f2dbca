"""Variational autoencoder with a negative-binomial likelihood (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2)."""

from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from training.families.family import (
    Dimensions,
    Example,
    Family,
    Graph,
    Hyperparameters,
    Statistics,
    build_classifier,
    input_transform,
    standard_graphs,
)
from training.likelihoods import negative_binomial, normal_divergence
from training.networks import BatchCode, mlp


class VAEHyperparameters(Hyperparameters):
    """Hyper-parameters of `vae`."""

    classifier_weight: Annotated[float, Field(ge=0)] = 100.0
    """Weight of the cross-entropy of the labels beside the evidence bound, which is some hundred nats per cell."""

    classify_draws: bool = False
    """While training, classify a draw from the posterior and not its mean, so that classes keep apart by more than its width."""

    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence from the prior (beta)."""

    kl_warmup_epochs: Annotated[int, Field(ge=0)] = 20
    """Epochs over which that weight rises from 0."""

    reconstruction_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the evidence bound beside the labels' cross-entropy."""


@final
class VAE(Family):
    """Gaussian posterior; the decoder alone knows the technical batch, so the encoder takes cells of any."""

    name: ClassVar[str] = "vae"
    defaults: ClassVar[type[Hyperparameters]] = VAEHyperparameters

    def __init__(self, hyperparameters: VAEHyperparameters, dimensions: Dimensions, statistics: Statistics) -> None:
        super().__init__(hyperparameters, dimensions, statistics)
        hp = self.hyperparameters = hyperparameters
        self.dimensions = dimensions
        self.transform = input_transform(hp, statistics)
        self.input_dropout = nn.Dropout(hp.input_dropout)
        widths = [dimensions.n_genes, *hp.hidden]
        self.encoder = mlp(widths, hp.dropout, hp.layer_norm)
        self.to_mean = nn.Linear(widths[-1], hp.n_latent)
        self.to_log_variance = nn.Linear(widths[-1], hp.n_latent)
        self.batch_code = BatchCode(dimensions.n_batches)
        n_decoder_inputs = hp.n_latent + dimensions.n_batches
        self.decoder = mlp([n_decoder_inputs, *hp.hidden[::-1]], 0.0, hp.layer_norm)
        self.to_share = nn.Linear(hp.hidden[0] if hp.hidden else n_decoder_inputs, dimensions.n_genes)
        self.log_theta = nn.Parameter(torch.zeros(dimensions.n_genes))
        self.classifier = build_classifier(hp, statistics)

    def encode(self, counts: Tensor) -> Tensor:
        """Raw counts (n, n_genes) to the posterior's mean (n, n_latent)."""
        return self.to_mean(self.encoder(self._input(counts)))

    def decode(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """Expected counts (n, n_genes): each gene's share of the cell's `library`."""
        share = torch.softmax(self.to_share(self.decoder(self.batch_code(latent, batch))), dim=1)
        return share * library.unsqueeze(1)

    def loss(self, example: Example) -> dict[str, Tensor]:
        """Evidence bound in nats per cell with one draw of the latent, and cross-entropy of the labels."""
        hp = self.hyperparameters
        features = self.encoder(self._input(example.counts))
        mean, log_variance = self.to_mean(features), self.to_log_variance(features).clamp(-8.0, 4.0)
        latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        expected = self.decode(latent, example.target.sum(dim=1).clamp(min=1.0), example.batch)
        reconstruction = negative_binomial(example.target, expected, self.log_theta).sum(dim=1).mean()
        divergence = normal_divergence(mean, log_variance).sum(dim=1).mean()
        warm = min(1.0, (example.epoch + 1) / hp.kl_warmup_epochs) if hp.kl_warmup_epochs else 1.0
        losses = {"reconstruction": reconstruction, "divergence": divergence}
        losses["loss"] = hp.reconstruction_weight * (reconstruction + warm * hp.kl_weight * divergence)
        if self.classifier is not None:
            classified = latent if hp.classify_draws and self.training else mean
            losses["classification"] = self.classifier.loss(classified, example.labels, hp.label_smoothing)
            losses["loss"] = losses["loss"] + hp.classifier_weight * losses["classification"]
        return losses

    def graphs(self) -> dict[str, Graph]:
        """Encode, decode and classify."""
        return standard_graphs(self, self.dimensions)

    def gene_weight(self) -> Tensor:
        """First layer of the encoder per unit of log-normalised expression, (n_hidden, n_genes)."""
        weight = (self.encoder[0] if self.hyperparameters.hidden else self.to_mean).weight
        return weight if self.transform.std is None else weight / self.transform.std

    def _input(self, counts: Tensor) -> Tensor:
        return self.input_dropout(self.transform(counts))
