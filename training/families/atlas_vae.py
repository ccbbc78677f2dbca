"""Batch-free encoder, decoder with codes of batches, heads for cell types, as scAtlasVAE (Xue et al. 2025, doi:10.1038/s41592-024-02530-0)."""

from typing import Annotated, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from training import mmd
from training.batch_levels import BatchLevels
from training.families.family import (
    Axis,
    ClassifyingHyperparameters,
    Dimensions,
    Example,
    Graph,
    Hyperparameters,
    Names,
    Statistics,
    build_classifier,
    standard_graphs,
)
from training.families.observing import ObservingFamily, ObservingHyperparameters, hidden_layers, input_transform
from training.likelihoods import LikelihoodName, normal_divergence
from training.tabnet import TabNet


class AtlasVAEHyperparameters(ObservingHyperparameters, ClassifyingHyperparameters):
    """Hyper-parameters of `atlas_vae`."""

    hidden: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (128,)
    n_latent: Annotated[int, Field(gt=0)] = 10
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    layer_norm: bool = True
    classifier_weight: Annotated[float, Field(ge=0)] = 100.0
    """Weight of the cross-entropy of the labels beside the evidence bound, which is some hundred nats per cell."""

    class_weight_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """1, as published: a class weighs the inverse of its number of cells."""

    classify_draws: bool = True
    """While training, classify a draw from the posterior, as published, and not its mean. While serving it is always the mean."""

    classifier_from_epoch: Annotated[int, Field(ge=0)] = 0
    """First epoch (from 0) in which labels are learned. As published it would be 10 less than the number of epochs."""

    encoder: Literal["mlp", "tabnet"] = "mlp"
    tabnet_steps: Annotated[int, Field(gt=0)] = 3
    """Masks of the TabNet encoder; its width is the last of `hidden`."""

    tabnet_gamma: Annotated[float, Field(ge=1)] = 1.3
    """1: each gene is used in one step only. Larger: it may be used again."""

    tabnet_sparsity: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the masks' entropy."""

    encode_library: bool = False
    """Give the encoder the logarithm of the library size beside the genes."""

    batch_code: Literal["embedding", "one_hot"] = "embedding"
    batch_width: Annotated[int, Field(gt=0)] = 8
    """Of each batch level's embedding."""

    likelihood: LikelihoodName = "zero_inflated_negative_binomial"
    dispersion: Literal["gene", "gene_batch", "gene_cell"] = "gene_cell"
    """What the inverse dispersion, or the deviation, is a function of."""

    gate_weight: Annotated[float, Field(ge=0)] = 1.0
    """Penalty per cell on the sum of its zero inflations, which pushes them off where they explain little."""

    reconstruction_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the reconstruction beside all else."""

    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the divergence from the prior (beta)."""

    kl_warmup_epochs: Annotated[int, Field(ge=0)] = 20
    """Epochs over which that weight rises from 0."""

    mmd: Literal["flat", "hierarchical"] = "flat"
    """flat: between all pairs of batches. hierarchical: between values of the first batch level, and of each further one within those above."""

    mmd_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the discrepancy between the posterior means of batches. It also removes what differs because cell types do."""

    constraint: Literal["mse", "normal"] = "mse"
    """How the latent is held to a given embedding: squared error of the mean, or the divergence from a normal of unit variance around it."""

    constraint_weight: Annotated[float, Field(ge=0)] = 0.0
    constraint_key: str = "X_start"
    """Key of `obsm` with the given embedding, n_latent wide; cells without one are free. X_start: that of the run begun with."""


@final
class AtlasVAE(ObservingFamily):
    """The encoder never sees the batch, so a query of any batch is embedded without training."""

    name: ClassVar[str] = "atlas_vae"
    defaults: ClassVar[type[Hyperparameters]] = AtlasVAEHyperparameters

    def __init__(
        self, hyperparameters: AtlasVAEHyperparameters, dimensions: Dimensions, statistics: Statistics
    ) -> None:
        super().__init__(hyperparameters, dimensions, statistics)
        hp = self.hyperparameters = hyperparameters
        self.dimensions = dimensions
        self.average_batch = dimensions.n_batches
        if hp.constraint_weight and len(dimensions.obsm[hp.constraint_key]) != hp.n_latent:
            raise ValueError(
                f"obsm['{hp.constraint_key}'] is {len(dimensions.obsm[hp.constraint_key])} wide and n_latent {hp.n_latent}: a "
                "latent can only be held to an embedding of its own width."
            )
        self.transform = input_transform(hp, statistics)
        self.input_dropout = nn.Dropout(hp.input_dropout)
        self.encoder: nn.Module
        if hp.encoder == "tabnet":
            self.encoder = TabNet(dimensions.n_genes, hp.hidden[-1], hp.tabnet_steps, hp.tabnet_gamma, hp.dropout)
        else:
            self.encoder = hidden_layers(hp, [dimensions.n_genes, *hp.hidden], hp.dropout)
        self.encodes_library = hp.encode_library
        n_features = hp.hidden[-1] + int(hp.encode_library)
        self.to_mean = nn.Linear(n_features, hp.n_latent)
        self.to_log_variance = nn.Linear(n_features, hp.n_latent)
        self.batches = BatchLevels(dimensions.batch_levels, hp.batch_code, hp.batch_width)
        self.decoder = hidden_layers(hp, [hp.n_latent + self.batches.width, *hp.hidden[::-1]], 0.0)
        self.add_heads(hp.hidden[0])
        self.classifier = build_classifier(hp, statistics)

    @classmethod
    def obsm_keys(cls, hyperparameters: Hyperparameters) -> tuple[str, ...]:
        """The embedding that the latent is held to, if there is one."""
        assert isinstance(hyperparameters, AtlasVAEHyperparameters)
        return (hyperparameters.constraint_key,) if hyperparameters.constraint_weight else ()

    def encode_values(self, values: Tensor, counts: Tensor) -> Tensor:
        """Transformed counts (n, n_genes) to the posterior's mean (n, n_latent)."""
        return self.to_mean(self._encoded(values, counts)[0])

    def features(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:  # noqa: ARG002 - a decoder's signature
        """The decoder's last hidden layer; batch n_batches is the average one."""
        return self.decoder(torch.cat([latent, self.batches(batch)], dim=1))

    def sample_latent(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal."""
        return torch.randn(n, self.hyperparameters.n_latent, generator=generator)

    def loss(self, example: Example) -> dict[str, Tensor]:
        """Evidence bound in nats per cell with one draw of the latent, and what else has a weight."""
        hp = self.hyperparameters
        batch = self.batches.known_or_average(example.batch)
        features, entropy = self._encoded(self.transform(example.counts), example.counts)
        mean, log_variance = self.to_mean(features), self.to_log_variance(features).clamp(-8.0, 4.0)
        latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = self.features(latent, example.target.sum(dim=1), batch)
        reconstruction = self.reconstruction(decoded, example.target, batch).mean()
        divergence = normal_divergence(mean, log_variance).sum(dim=1).mean()
        warm = min(1.0, (example.epoch + 1) / hp.kl_warmup_epochs) if hp.kl_warmup_epochs else 1.0
        losses = {"reconstruction": reconstruction, "divergence": divergence}
        weighted = [hp.reconstruction_weight * reconstruction, warm * hp.kl_weight * divergence]
        if self.likelihood.is_inflated:
            losses["gate"] = self.inflation(decoded).sum(dim=1).mean()
            weighted.append(hp.gate_weight * losses["gate"])
        if entropy is not None:
            losses["mask_entropy"] = entropy
            weighted.append(hp.tabnet_sparsity * entropy)
        if hp.mmd_weight:
            losses["mmd"] = self._discrepancy(mean, example.batch)
            weighted.append(hp.mmd_weight * losses["mmd"])
        if hp.constraint_weight:
            losses["constraint"] = self._constraint(mean, log_variance, example.obsm[hp.constraint_key])
            weighted.append(hp.constraint_weight * losses["constraint"])
        if self.classifier is not None and example.epoch >= hp.classifier_from_epoch:
            classified = latent if hp.classify_draws and self.training else mean
            losses["classification"] = self.classifier.loss(classified, example.labels, hp.label_smoothing)
            weighted.append(hp.classifier_weight * losses["classification"])
        losses["loss"] = torch.stack(weighted).sum()
        return losses

    def graphs(self) -> dict[str, Graph]:
        """Encode, decode and classify."""
        return standard_graphs(self, self.dimensions)

    def gene_weight(self) -> Tensor:
        """First layer of the encoder per unit of log-normalised expression, (n_hidden, n_genes)."""
        weight = (self.encoder.shared[0] if isinstance(self.encoder, TabNet) else self.encoder[0]).weight
        std = getattr(self.transform, "std", None)
        return weight if std is None else weight / std

    def axes(self, names: Names) -> dict[str, tuple[Axis, ...]] | None:
        """Tensors whose shape depends on genes, batches or classes."""
        genes = tuple(("gene", gene) for gene in names.genes)
        inputs = tuple(("latent", str(i)) for i in range(self.hyperparameters.n_latent))
        axes: dict[str, tuple[Axis, ...]] = dict.fromkeys(("transform.mean", "transform.std"), (genes,))
        for i, level in enumerate(self.batches.levels):
            values = tuple(("batch", level.name, value) for value in level.values)
            if self.batches.is_embedding:
                axes[f"batches.table_{i}"] = (values, None)
                values = tuple(("code", level.name, str(unit)) for unit in range(self.hyperparameters.batch_width))
            inputs += values
        axes["decoder.0.weight"] = (None, inputs)
        heads = self.head_axes(genes, tuple(("batch", "", name) for name in _batch_names(self.dimensions)))
        if heads is None:
            return None
        axes |= heads
        if isinstance(self.encoder, TabNet):
            axes["encoder.shared.0.weight"] = (None, genes)
            for i in range(len(self.encoder.choosers)):
                axes |= {f"encoder.choosers.{i}.0.weight": (genes, None), f"encoder.choosers.{i}.0.bias": (genes,)}
                axes |= {f"encoder.choosers.{i}.1.{name}": (genes,) for name in ("weight", "bias")}
        else:
            axes["encoder.0.weight"] = (None, genes)
        for level, classes in names.classes.items():
            known = tuple(("class", level, name) for name in classes)
            axes |= {f"classifier.heads.{level}.weight": (known, None), f"classifier.heads.{level}.bias": (known,)}
        return axes

    def _encoded(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (n, n_features), and the entropy of TabNet's masks."""
        values, entropy = self.input_dropout(values), None
        if isinstance(self.encoder, TabNet):
            features, entropy = self.encoder(values)
        else:
            features = self.encoder(values)
        if self.hyperparameters.encode_library:
            features = torch.cat([features, torch.log(counts.sum(dim=1, keepdim=True) + 1.0)], dim=1)
        return features, entropy

    def _discrepancy(self, mean: Tensor, batch: Tensor) -> Tensor:
        if self.hyperparameters.mmd == "flat":
            return mmd.discrepancy(mean, batch)
        known = batch.clamp(min=0)
        return mmd.hierarchical_discrepancy(
            mean, [codes[known].masked_fill(batch < 0, -1) for codes in self.batches.codes]
        )

    def _constraint(self, mean: Tensor, log_variance: Tensor, wanted: Tensor) -> Tensor:
        """Mean over the cells that have a wanted embedding."""
        known = torch.isfinite(wanted).all(dim=1)
        difference = mean - torch.nan_to_num(wanted)
        if self.hyperparameters.constraint == "mse":
            per_cell = difference.square().mean(dim=1)
        else:
            per_cell = normal_divergence(difference, log_variance).sum(dim=1)
        return (per_cell * known).sum() / known.sum().clamp(min=1)


def _batch_names(dimensions: Dimensions) -> tuple[str, ...]:
    columns = [[level.values[code] for code in level.codes] for level in dimensions.batch_levels]
    return tuple(" | ".join(values) for values in zip(*columns, strict=True))
