"""The networks of SCVI and SCANVI in torch, from saved weights: encoder, decoder and classifier as they answer after training.

What a cell's batch or covariate adds to a layer is a row of a table, so that a fixed batch becomes part of the bias (Lopez et al. 2018,
doi:10.1038/s41592-018-0229-2; Xu et al. 2021, doi:10.15252/msb.20209620; arithmetic as in scvi-tools 1.4).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.families.family import Decode, Encode, Graph
from training.importers.scvi_file import SavedScvi, UnsupportedOption
from training.networks import InputTransform, LogCounts, RawCounts

AVERAGE = "average"
BATCH_NORM_EPSILON = 1e-3


@dataclass(frozen=True)
class BatchChoice:
    """As what every cell is encoded and decoded where the model wants to know more than its counts."""

    encoder_batch: str | None
    """A batch, "average" for the mean of the codes of all batches, None where the encoder takes none."""

    covariates: Mapping[str, str]
    """Column → a category, or "average"."""


class Layer(nn.Module):
    """Linear (plus a row by batch), BatchNorm, LayerNorm, ReLU; the norms where the model has them."""

    def __init__(
        self, weight: Tensor, bias: Tensor, by_batch: Tensor | None, norm: nn.BatchNorm1d | None, layer_norm: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight.data, self.linear.bias.data = weight.clone(), bias.clone()
        self.register_buffer("by_batch", by_batch)
        self.batch_norm = norm
        self.layer_norm = nn.LayerNorm(len(bias), elementwise_affine=False) if layer_norm else None

    def forward(self, values: Tensor, batch: Tensor | None = None) -> Tensor:
        """Values (n, n_in) and batch int64 (n,) to (n, n_out)."""
        values = self.linear(values)
        if self.by_batch is not None:
            values = values + nn.functional.embedding(batch, self.by_batch)
        for norm in (self.batch_norm, self.layer_norm):
            values = values if norm is None else norm(values)
        return torch.relu(values)


class ScviNetwork(nn.Module):
    """Encoder, decoder and, for SCANVI, classifier on raw counts."""

    encodes_library = False

    def __init__(self, saved: SavedScvi, choice: BatchChoice, level: str) -> None:
        """Build the networks.

        Args:
            saved: names, options and weights.
            choice: what stands for the batch and covariates of a cell.
            level: name of the label level.

        Raises:
            UnsupportedOption: weights that no option explains.
        """
        super().__init__()
        self._saved, self._choice, self._level = saved, choice, level
        options = saved.options
        self.transform: InputTransform = LogCounts(None) if options["log_variational"] else RawCounts(None)
        is_encoded = options["encode_covariates"]
        self.encoder = nn.ModuleList(
            self._layers("z_encoder.encoder", len(saved.genes), "encoder", is_encoded, fixed=True)
        )
        self.to_mean = self._linear("z_encoder.mean_encoder")
        self.decoder = nn.ModuleList(
            self._layers("decoder.px_decoder", self.to_mean.out_features, "decoder", True, fixed=False)
        )
        self.to_share = self._linear("decoder.px_scale_decoder.0")
        self.heads, self.trunk = None, nn.ModuleList()
        if saved.labels:
            place = "classifier.classifier.0"
            if f"{place}.weight" not in saved.weights:
                self.trunk = nn.ModuleList(self._layers(place, self.to_mean.out_features, "encoder", False, fixed=True))
                place = "classifier.classifier.1"
            self.heads = self._linear(place)
        if self.heads is not None and self.heads.out_features != len(saved.labels):
            raise UnsupportedOption(
                f"The classifier has {self.heads.out_features} outputs for {len(saved.labels)} labels."
            )

    @property
    def n_latent(self) -> int:
        """Width of the latent."""
        return self.to_mean.out_features

    def encode(self, counts: Tensor) -> Tensor:
        """Raw counts (n, n_genes) to the posterior's mean (n, n_latent)."""
        values = self.transform(counts)
        for layer in self.encoder:
            values = layer(values)
        return self.to_mean(values)

    def decode(self, latent: Tensor, library: Tensor, batch: Tensor) -> Tensor:
        """Expected counts before zero inflation (scvi-tools' px_rate), (n, n_genes)."""
        values = latent
        for layer in self.decoder:
            values = layer(values, batch)
        return torch.softmax(self.to_share(values), dim=1) * library.unsqueeze(1)

    def graphs(self) -> dict[str, Graph]:
        """encode, decode and, for SCANVI, classify."""
        graphs = {
            "encode": Graph(Encode(self), ("counts",), ("latent",)),
            "decode": Graph(Decode(self), ("latent", "library", "batch"), ("expression",)),
        }
        if self.heads is not None:
            graphs["classify"] = Graph(Classify(self), ("latent",), (f"probabilities_{self._level}",))
        return graphs

    def gene_weight(self) -> Tensor:
        """First layer of the encoder, (n_hidden, n_genes)."""
        return self.encoder[0].linear.weight

    def _linear(self, place: str) -> nn.Linear:
        weight, bias = self._saved.weights[f"{place}.weight"], self._saved.weights[f"{place}.bias"]
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
        return linear

    def _layers(self, place: str, n_in: int, part: str, knows_batch: bool, fixed: bool) -> list[Layer]:
        """The layers at `place`; `fixed` puts the batch into the bias, else it is an input."""
        saved, layers = self._saved, []
        has_layer_norm = saved.options["use_layer_norm"] in (part, "both")
        while f"{place}.fc_layers.Layer {len(layers)}.0.weight" in saved.weights:
            name = f"{place}.fc_layers.Layer {len(layers)}"
            is_first = not layers
            weight, bias = saved.weights[f"{name}.0.weight"].double(), saved.weights[f"{name}.0.bias"].double()
            by_batch = torch.zeros(len(saved.batches), len(bias), dtype=torch.float64)
            if knows_batch:
                codes, covariates = self._codes(is_first)
                used = n_in + codes.shape[1] + sum(code.shape[1] for code in covariates.values())
                is_injected = is_first or saved.options["deeply_inject_covariates"]
                if is_injected and used != weight.shape[1]:
                    raise UnsupportedOption(f"{name} takes {weight.shape[1]} values, and its options explain {used}.")
                if is_injected:
                    start = n_in + codes.shape[1]
                    by_batch = codes @ weight[:, n_in:start].T
                    for key, code in covariates.items():
                        rows = code @ weight[:, start : start + code.shape[1]].T
                        bias = bias + self._chosen(rows, saved.covariates[key], self._choice.covariates[key])
                        start += code.shape[1]
            if fixed and knows_batch and self._choice.encoder_batch is not None:
                bias = bias + self._chosen(by_batch, saved.batches, self._choice.encoder_batch)
            # The first layer takes the batch even where it makes no difference, so that the graph has its input.
            table = by_batch.float() if not fixed and (is_first or by_batch.any()) else None
            layers.append(
                Layer(weight[:, :n_in].float(), bias.float(), table, self._batch_norm(f"{name}.1"), has_layer_norm)
            )
            n_in = len(bias)
        return layers

    def _codes(self, is_first: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """What stands for each batch in the input of a layer, (n_batches, width), and for each category of each covariate."""
        saved = self._saved
        n_batches = len(saved.batches)
        # scvi-tools leaves out what has one category only.
        codes = (
            torch.eye(n_batches, dtype=torch.float64)
            if n_batches > 1
            else torch.zeros(n_batches, 0, dtype=torch.float64)
        )
        if saved.options["batch_representation"] == "embedding":
            name = next(name for name in saved.weights if name.endswith("batch.weight") and "embedding" in name)
            # An embedding is part of the input of the first layer; one-hot codes go into all.
            codes = saved.weights[name].double() if is_first else torch.zeros(n_batches, 0, dtype=torch.float64)
        covariates = {
            key: torch.eye(len(names), dtype=torch.float64) for key, names in saved.covariates.items() if len(names) > 1
        }
        return codes, covariates

    def _chosen(self, rows: Tensor, names: tuple[str, ...], name: str) -> Tensor:
        return rows.mean(dim=0) if name == AVERAGE else rows[names.index(name)]

    def _batch_norm(self, name: str) -> nn.BatchNorm1d | None:
        weights = self._saved.weights
        if f"{name}.running_mean" not in weights:
            return None
        norm = nn.BatchNorm1d(len(weights[f"{name}.weight"]), eps=BATCH_NORM_EPSILON)
        norm.load_state_dict(
            {key: weights[f"{name}.{key}"] for key in norm.state_dict() if f"{name}.{key}" in weights}, strict=False
        )
        return norm


class Classify(nn.Module):
    """latent (n, n_latent) → probabilities (n, n_classes)."""

    def __init__(self, network: ScviNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor) -> Tensor:
        """Class probabilities. Models before scvi-tools 1.1 end in a softmax of their own, which gives the same."""
        for layer in self.network.trunk:
            latent = layer(latent)
        return torch.softmax(self.network.heads(latent), dim=1)
