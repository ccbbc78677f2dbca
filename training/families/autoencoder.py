"""Autoencoder on log-normalised expression, as sc-autoencoder (Heumos et al. 2023, doi:10.1093/bioinformatics/btad164)."""

from typing import ClassVar, final

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
from training.likelihoods import squared_error
from training.networks import BatchCode, mlp


class AutoencoderHyperparameters(Hyperparameters):
    """Hyper-parameters of `autoencoder`."""

    relu_latent: bool = False
    """Pass the latent through ReLU, as sc-autoencoder does; units can then die."""

    decoder_uses_batch: bool = False
    """Give the decoder the technical batch, so that the latent need not hold it."""

    reconstruction_weight: float = 1.0
    """Weight of the squared error per gene."""


@final
class Autoencoder(Family):
    """MLP to the latent and back; the loss is the squared error of the transformed input (and cross-entropy of labels)."""

    name: ClassVar[str] = "autoencoder"
    defaults: ClassVar[type[Hyperparameters]] = AutoencoderHyperparameters

    def __init__(
        self, hyperparameters: AutoencoderHyperparameters, dimensions: Dimensions, statistics: Statistics
    ) -> None:
        super().__init__(hyperparameters, dimensions, statistics)
        hp = self.hyperparameters = hyperparameters
        self.dimensions = dimensions
        self.transform = input_transform(hp, statistics)
        self.input_dropout = nn.Dropout(hp.input_dropout)
        widths = [dimensions.n_genes, *hp.hidden]
        self.encoder = mlp(widths, hp.dropout, hp.layer_norm)
        self.to_latent = nn.Sequential(
            nn.Linear(widths[-1], hp.n_latent), nn.ReLU() if hp.relu_latent else nn.Identity()
        )
        self.batch_code = BatchCode(dimensions.n_batches) if hp.decoder_uses_batch else None
        n_decoder_inputs = hp.n_latent + (dimensions.n_batches if hp.decoder_uses_batch else 0)
        self.decoder = mlp([n_decoder_inputs, *hp.hidden[::-1]], 0.0, hp.layer_norm)
        self.to_values = nn.Linear(hp.hidden[0] if hp.hidden else n_decoder_inputs, dimensions.n_genes)
        self.classifier = build_classifier(hp, statistics)

    def encode(self, counts: Tensor) -> Tensor:
        """Raw counts (n, n_genes) to latent (n, n_latent)."""
        return self.to_latent(self.encoder(self._input(counts)))

    def decode(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """Expected counts (n, n_genes)."""
        return self.transform.expected_counts(self._values(latent, batch), library)

    def loss(self, example: Example) -> dict[str, Tensor]:
        """Squared error per gene, and cross-entropy of the labels."""
        latent = self.encode(example.counts)
        error = squared_error(self.transform(example.target), self._values(latent, example.batch)).mean()
        losses = {"reconstruction": error, "loss": self.hyperparameters.reconstruction_weight * error}
        if self.classifier is not None:
            losses["classification"] = self.classifier.loss(
                latent, example.labels, self.hyperparameters.label_smoothing
            )
            losses["loss"] = losses["loss"] + self.hyperparameters.classifier_weight * losses["classification"]
        return losses

    def graphs(self) -> dict[str, Graph]:
        """Encode, decode and classify."""
        return standard_graphs(self, self.dimensions)

    def gene_weight(self) -> Tensor:
        """First layer of the encoder per unit of log-normalised expression, (n_hidden, n_genes)."""
        weight = (self.encoder[0] if self.hyperparameters.hidden else self.to_latent[0]).weight
        return weight if self.transform.std is None else weight / self.transform.std

    def _input(self, counts: Tensor) -> Tensor:
        return self.input_dropout(self.transform(counts))

    def _values(self, latent: Tensor, batch: Tensor) -> Tensor:
        features = latent if self.batch_code is None else self.batch_code(latent, batch)
        return self.to_values(self.decoder(features))
