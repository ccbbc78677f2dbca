"""Two encoders, one latent: RNA and surface proteins of a cell, as citeseq_autoencoder (naity; Nuwa)."""

from itertools import pairwise
from typing import Annotated, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from training.families.family import (
    ClassifyingHyperparameters,
    Dimensions,
    Example,
    Family,
    Graph,
    Hyperparameters,
    Imputed,
    Statistics,
    build_classifier,
    standard_graphs,
)
from training.likelihoods import squared_error
from training.networks import BatchCode, LogNormalise
from training.protein import CentredLogRatio

PROTEIN = "protein"
Widths = tuple[Annotated[int, Field(gt=0)], ...]


class CiteAutoencoderHyperparameters(ClassifyingHyperparameters):
    """Hyper-parameters of `cite_autoencoder`."""

    hidden: Annotated[Widths, Field(min_length=1)] = (120,)
    """Widths of the RNA encoder's layers."""

    protein_hidden: Annotated[Widths, Field(min_length=1)] = (8,)
    """Widths of the protein encoder's layers."""

    decoder_hidden: Widths = (128,)
    """Widths of the layers that both modalities are decoded through."""

    n_latent: Annotated[int, Field(gt=0)] = 20
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    layer_norm: bool = True
    scale: bool = True
    min_std: Annotated[float, Field(ge=0)] = 0.2
    clip: Annotated[float, Field(gt=0)] | None = 10.0
    protein_key: str = "protein_counts"
    """Key of `obsm` with the counts of each antibody, a table with their names."""

    protein_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the mean squared error of the proteins beside that of the genes. The published model has the number of antibodies divided
    by that of the genes: it takes the mean over all columns together."""

    protein_dropout: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of cells whose protein the encoder does not see while training, so that cells without any can be encoded; 0 trains an encoder
    of both only."""

    decoder_uses_batch: bool = False
    """Give the decoder the technical batch, so that the latent need not hold it."""


class DecodeBoth(nn.Module):
    """latent (n, n_latent), library (n,), batch int64 (n,) → expression (n, n_genes), protein (n, n_antibodies)."""

    def __init__(self, family: "CiteAutoencoder") -> None:
        super().__init__()
        self.family = family

    def forward(self, latent: Tensor, library: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Counts of cells with `library` counts of RNA."""
        return self.family.decode_both(latent, library, batch)


@final
class CiteAutoencoder(Family):
    """Genes and antibodies meet in the latent; a cell without proteins has a learned code in their place."""

    name: ClassVar[str] = "cite_autoencoder"
    defaults: ClassVar[type[Hyperparameters]] = CiteAutoencoderHyperparameters

    def __init__(
        self, hyperparameters: CiteAutoencoderHyperparameters, dimensions: Dimensions, statistics: Statistics
    ) -> None:
        super().__init__(hyperparameters, dimensions, statistics)
        hp = self.hyperparameters = hyperparameters
        self.dimensions = dimensions
        antibodies = dimensions.obsm[hp.protein_key]
        self.imputes = (Imputed(PROTEIN, hp.protein_key, antibodies, "counts per cell of the antibody"),)
        mean, std = (statistics.mean, statistics.std.clamp(min=hp.min_std)) if hp.scale else (None, None)
        self.transform = LogNormalise(hp.target_sum, mean, std, hp.clip)
        self.protein_transform = CentredLogRatio(statistics.obsm[hp.protein_key])
        self.input_dropout = nn.Dropout(hp.input_dropout)
        self.encoder = _layers((dimensions.n_genes, *hp.hidden), hp.dropout, hp.layer_norm)
        self.protein_encoder = _layers((len(antibodies), *hp.protein_hidden), hp.dropout, hp.layer_norm)
        self.absent_protein = nn.Parameter(torch.zeros(hp.protein_hidden[-1]))
        self.to_latent = nn.Linear(hp.hidden[-1] + hp.protein_hidden[-1], hp.n_latent)
        self.batch_code = BatchCode(dimensions.n_batches) if hp.decoder_uses_batch else None
        widths = (hp.n_latent + (dimensions.n_batches if hp.decoder_uses_batch else 0), *hp.decoder_hidden)
        self.decoder = _layers(widths, 0.0, hp.layer_norm)
        self.to_values = nn.Linear(widths[-1], dimensions.n_genes)
        self.to_protein = nn.Linear(widths[-1], len(antibodies))
        self.classifier = build_classifier(hp, statistics)

    @classmethod
    def obsm_keys(cls, hyperparameters: Hyperparameters) -> tuple[str, ...]:
        """The antibodies' counts."""
        assert isinstance(hyperparameters, CiteAutoencoderHyperparameters)
        return (hyperparameters.protein_key,)

    def encode_values(self, values: Tensor, counts: Tensor) -> Tensor:
        """Transformed counts (n, n_genes) to latent (n, n_latent), without protein."""
        return self._latent(values, self.absent_protein.expand(counts.shape[0], -1))

    def encode_both(self, counts: Tensor, protein: Tensor) -> Tensor:
        """Raw counts (n, n_genes) and antibodies' counts (n, n_antibodies), NaN where unknown, to latent (n, n_latent)."""
        return self._latent(self.transform(counts), self._protein_code(protein, _is_known(protein)))

    def decode(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """Expected counts (n, n_genes)."""
        return self.decode_both(latent, library, batch)[0]

    def decode_both(self, latent: Tensor, library: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Expected counts of genes (n, n_genes) and of antibodies (n, n_antibodies)."""
        values, protein = self._values(latent, batch)
        return self.transform.expected_counts(values, library), self.protein_transform.expected_counts(protein)

    def loss(self, example: Example) -> dict[str, Tensor]:
        """Squared error per gene and per antibody, each the mean over its own columns, and cross-entropy of the labels."""
        hp = self.hyperparameters
        protein = example.obsm[hp.protein_key]
        known = _is_known(protein)
        # Validated as it is served: without protein, unless the encoder never learned to be.
        hidden = torch.rand(len(protein), device=protein.device) < hp.protein_dropout
        seen = known & ~(hidden if self.training else torch.full_like(known, hp.protein_dropout > 0))
        latent = self._latent(self.transform(example.counts), self._protein_code(protein, seen))
        values, found = self._values(latent, example.batch)
        rna = squared_error(self.transform(example.target), values).mean()
        target = self.protein_transform(protein)
        measured = torch.isfinite(target)
        error = torch.where(measured, squared_error(torch.nan_to_num(target), found), torch.zeros_like(found))
        surface = error.sum() / measured.sum().clamp(min=1)
        losses = {"rna": rna, "protein": surface, "loss": rna + hp.protein_weight * surface}
        if self.classifier is not None:
            losses["classification"] = self.classifier.loss(latent, example.labels, hp.label_smoothing)
            losses["loss"] = losses["loss"] + hp.classifier_weight * losses["classification"]
        return losses

    def graphs(self) -> dict[str, Graph]:
        """Encode without protein, decode both modalities, and classify."""
        graphs = standard_graphs(self, self.dimensions)
        graphs["decode"] = Graph(DecodeBoth(self), ("latent", "library", "batch"), ("expression", PROTEIN))
        return graphs

    def gene_weight(self) -> Tensor:
        """First layer of the RNA encoder per unit of log-normalised expression, (n_hidden, n_genes)."""
        weight = self.encoder[0].weight
        return weight if self.transform.std is None else weight / self.transform.std

    def _protein_code(self, protein: Tensor, seen: Tensor) -> Tensor:
        codes = self.protein_encoder(torch.nan_to_num(self.protein_transform(protein)))
        return torch.where(seen[:, None], codes, self.absent_protein)

    def _latent(self, values: Tensor, protein_code: Tensor) -> Tensor:
        features = self.encoder(self.input_dropout(values))
        return self.to_latent(torch.cat([features, protein_code], dim=1))

    def _values(self, latent: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        features = self.decoder(latent if self.batch_code is None else self.batch_code(latent, batch))
        return self.to_values(features), self.to_protein(features)


def _is_known(protein: Tensor) -> Tensor:
    """Which cells have any antibody measured, bool (n,)."""
    return torch.isfinite(protein).any(dim=1)


def _layers(sizes: Widths, dropout: float, layer_norm: bool) -> nn.Sequential:
    """Linear, LeakyReLU (, LayerNorm) and dropout: the published order, activation before norm, but the norm is within a cell."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.LeakyReLU()]
        if layer_norm:
            layers.append(nn.LayerNorm(n_out))
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)
