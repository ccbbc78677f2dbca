"""Deterministic autoencoder, in the shape of sc-autoencoder or of the expression-saliency autoencoder.

Sources: Heumos et al. 2023, doi:10.1093/bioinformatics/btad164; Kinalis et al. 2019, doi:10.1186/s12859-019-2952-9.
"""

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Distribution

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
from training.likelihoods import LikelihoodName, SquaredError, squared_error
from training.networks import BatchCode, activate


class AutoencoderHyperparameters(ObservingHyperparameters, ClassifyingHyperparameters):
    """Hyper-parameters of `autoencoder`."""

    likelihood: LikelihoodName = "mse"
    """mse: squared error of the encoder's own input, scaled and clipped as it is. Others explain counts (see docs/likelihoods.md)."""

    latent_activation: Literal["none", "relu", "softplus"] = "none"
    """relu: as sc-autoencoder, so that the latent is not negative and units can die. softplus: as the expression-saliency autoencoder."""

    orthogonality: Annotated[float, Field(ge=0)] = 0.0
    """Weight of ||I - W Wᵀ||_F, W the layer that gives the latent, so that units stand for different things. The norm is always reported."""

    orthogonality_published: bool = False
    """Compute that norm as the published code does, from weights that have no gradient: it changes the loss and nothing else."""

    input_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of normal noise on the encoder's input while training (a denoising autoencoder)."""

    decoder_uses_batch: bool = False
    """Give the decoder the technical batch, so that the latent need not hold it."""

    reconstruction_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the squared error per gene, or of the negative log-likelihood per gene."""


@final
class Autoencoder(ObservingFamily):
    """MLP to the latent and back."""

    name: ClassVar[str] = "autoencoder"
    defaults: ClassVar[type[Hyperparameters]] = AutoencoderHyperparameters
    hyperparameters: AutoencoderHyperparameters

    def __init__(
        self, hyperparameters: AutoencoderHyperparameters, dimensions: Dimensions, statistics: Statistics
    ) -> None:
        super().__init__(hyperparameters, dimensions, statistics)
        hp = self.hyperparameters = hyperparameters
        self.dimensions = dimensions
        self.transform = input_transform(hp, statistics)
        self.input_dropout = nn.Dropout(hp.input_dropout)
        widths = [dimensions.n_genes, *hp.hidden]
        self.encoder = hidden_layers(hp, widths, hp.dropout)
        self.to_latent = nn.Sequential(nn.Linear(widths[-1], hp.n_latent))
        if hp.latent_activation != "none":
            self.to_latent.append(activate(hp.latent_activation, hp.softplus_beta or hp.n_latent))
        self.batch_code = BatchCode(dimensions.n_batches) if hp.decoder_uses_batch else None
        n_inputs = hp.n_latent + (dimensions.n_batches if hp.decoder_uses_batch else 0)
        decoder_widths = [n_inputs, *hp.hidden[::-1]]
        self.decoder = hidden_layers(hp, decoder_widths, 0.0)
        self.add_heads(decoder_widths[-1])
        self.classifier = build_classifier(hp, statistics)

    def encode_values(self, values: Tensor, counts: Tensor) -> Tensor:  # noqa: ARG002 - an encoder's signature
        """Transformed counts (n, n_genes) to latent (n, n_latent)."""
        return self._latent(values)

    def features(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:  # noqa: ARG002 - a decoder's signature
        """The decoder's last hidden layer."""
        return self.decoder(latent if self.batch_code is None else self.batch_code(latent, batch))

    def observed(self, counts: Tensor) -> Tensor:
        """What the likelihood explains of raw counts (n, n_genes): with mse the encoder's own input."""
        return self.transform(counts) if self._explains_input else super().observed(counts)

    def explain(self, features: Tensor, library: Tensor, batch: Tensor) -> Distribution:
        """The distribution of what is observed, from the decoder's last hidden layer (n, n_features)."""
        return (
            SquaredError(self.to_share(features)) if self._explains_input else super().explain(features, library, batch)
        )

    def expected_counts(self, features: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """Expected counts (n, n_genes)."""
        if self._explains_input:
            return self.transform.expected_counts(self.to_share(features), library)
        return super().expected_counts(features, library, batch)

    def loss(self, example: Example) -> dict[str, Tensor]:
        """Squared error or negative log-likelihood per gene, and what else has a weight."""
        hp = self.hyperparameters
        values = self.transform(example.counts)
        if hp.input_noise and self.training:
            values = values + hp.input_noise * torch.randn_like(values)
        latent = self._latent(values)
        coded = latent if self.batch_code is None else self.batch_code.known_or_average(latent, example.batch)
        decoded = self.decoder(coded)
        if self._explains_input:
            error = squared_error(self.transform(example.target), self.to_share(decoded)).mean()
        else:
            error = self.reconstruction(decoded, example.target, example.batch).mean() / self.dimensions.n_genes
        distance = self._distance_from_orthogonality()
        losses = {"reconstruction": error, "orthogonality": distance, "loss": hp.reconstruction_weight * error}
        if hp.orthogonality:
            losses["loss"] = losses["loss"] + hp.orthogonality * distance
        if self.classifier is not None:
            losses["classification"] = self.classifier.loss(latent, example.labels, hp.label_smoothing)
            losses["loss"] = losses["loss"] + hp.classifier_weight * losses["classification"]
        return losses

    def graphs(self) -> dict[str, Graph]:
        """Encode, decode and classify."""
        return standard_graphs(self, self.dimensions)

    def gene_weight(self) -> Tensor:
        """First layer of the encoder per unit of log-normalised expression, (n_hidden, n_genes)."""
        weight = (self.encoder[0] if self.hyperparameters.hidden else self.to_latent[0]).weight
        std = getattr(self.transform, "std", None)
        return weight if std is None else weight / std

    @property
    def _explains_input(self) -> bool:
        return self.hyperparameters.likelihood == "mse"

    def _latent(self, values: Tensor) -> Tensor:
        return self.to_latent(self.encoder(self.input_dropout(values)))

    def _distance_from_orthogonality(self) -> Tensor:
        """||I - W Wᵀ||_F, () (Kinalis et al. 2019, equation 2)."""
        weight = self.to_latent[0].weight
        if self.hyperparameters.orthogonality_published:
            weight = weight.detach()
        return torch.linalg.matrix_norm(torch.eye(len(weight), device=weight.device) - weight @ weight.T)
