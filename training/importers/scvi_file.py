"""What a saved scvi-tools model says of itself, and which of it we can serve: SCVI and SCANVI from 0.15 on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.importers.restricted_pickle import read_torch_file

MODEL_FILE = "model.pt"
MODELS = ("SCVI", "SCANVI")
DEFAULTS: dict[str, Any] = {
    "log_variational": True,
    "encode_covariates": False,
    "deeply_inject_covariates": True,
    "batch_representation": "one-hot",
    "use_batch_norm": "both",
    "use_layer_norm": "none",
}
"""Options that change the arithmetic, with scvi-tools' defaults."""

WITHOUT_EFFECT = (
    "n_hidden", "n_latent", "n_layers", "dropout_rate", "dispersion", "linear_classifier", "classifier_parameters", "batch_embedding_kwargs",
    "extra_payload_autotune", "datamodule", "use_cuda", "use_gpu", "n_labels", "n_batch", "n_input", "labels_groups", "y_prior",
)  # fmt: skip
"""Options that the shapes of the weights already tell, or that matter while training only."""


class NotAnScviModel(Exception):
    """A folder holds no model of scvi-tools that is known here."""


class UnsupportedOption(Exception):
    """A model was made with an option that cannot be served."""


@dataclass(frozen=True)
class SavedScvi:
    """A saved model: names, options and weights."""

    kind: str
    """A word of MODELS."""

    version: str
    genes: tuple[str, ...]
    batches: tuple[str, ...]
    batch_key: str
    covariates: dict[str, tuple[str, ...]]
    """Categorical covariates beside the batch: column → categories."""

    labels: tuple[str, ...]
    """Classes in output order; empty for SCVI."""

    labels_key: str
    n_cells: int
    """That it was trained and validated on."""

    options: dict[str, Any]
    """The keys of DEFAULTS."""

    weights: dict[str, torch.Tensor]

    @property
    def needs_batch(self) -> bool:
        """Whether the encoder, or the decoder beside the batch, wants to know something of each cell."""
        is_encoded = self.options["encode_covariates"] and len(self.batches) > 1
        return is_encoded or any(len(categories) > 1 for categories in self.covariates.values())


def read_scvi(folder: Path) -> SavedScvi:
    """Read <folder>/model.pt, or the only *model.pt there, without running it.

    Raises:
        NotAnScviModel: not there, too old, or another model than SCVI and SCANVI.
        UnsupportedOption: by name.
        UnsafePickle: the file holds more than data.
    """
    document = read_torch_file(find_model_file(folder))
    if not isinstance(document, dict) or not {"model_state_dict", "var_names", "attr_dict"} <= set(document):
        raise NotAnScviModel(f"{folder}: {MODEL_FILE} lacks model_state_dict, var_names or attr_dict.")
    attributes = document["attr_dict"]
    registry = attributes.get("registry_")
    if not isinstance(registry, dict):
        raise NotAnScviModel(
            f"{folder}: the model has no registry_, so it is older than scvi-tools 0.15. Save it again with a newer one."
        )
    kind = str(registry.get("model_name"))
    if kind not in MODELS:
        raise NotAnScviModel(f"{folder} holds a {kind}; {' and '.join(MODELS)} can be imported.")
    options = _options(folder, attributes["init_params_"])
    fields = registry["field_registries"]
    _check_setup(folder, registry)
    batch, labels = fields["batch"]["state_registry"], fields["labels"]["state_registry"]
    names = _texts(labels["categorical_mapping"])
    # scvi-tools puts the unlabelled category last, by swapping: the others are not in order of their names.
    unlabelled = str(labels.get("unlabeled_category", ""))
    covariates = fields.get("extra_categorical_covs", {}).get("state_registry", {}).get("mappings", {})
    weights = {name: w.float() for name, w in document["model_state_dict"].items() if isinstance(w, torch.Tensor)}
    return SavedScvi(
        kind=kind,
        version=str(registry.get("scvi_version", "unknown")),
        genes=_texts(document["var_names"]),
        batches=_texts(batch["categorical_mapping"]),
        batch_key=str(batch.get("original_key", "batch")),
        covariates={str(key): _texts(categories) for key, categories in covariates.items()},
        labels=tuple(name for name in names if name != unlabelled) if kind == "SCANVI" else (),
        labels_key=str(labels.get("original_key", "")),
        n_cells=sum(len(_array(attributes.get(f"{part}_indices_"))) for part in ("train", "validation", "test")),
        options=options,
        weights=weights,
    )


def find_model_file(folder: Path) -> Path:
    """The file of weights; scvi-tools may have put a prefix before its name.

    Raises:
        NotAnScviModel: there is none, or more than one.
    """
    found = [folder] if folder.is_file() else sorted(folder.glob(f"*{MODEL_FILE}"))
    if len(found) != 1:
        listed = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "nothing"
        legacy = " model_params.pt is of scvi-tools before 0.15." if (folder / "model_params.pt").exists() else ""
        raise NotAnScviModel(f"{folder} should hold one {MODEL_FILE}; it holds {listed}.{legacy}")
    return found[0]


def _options(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """The options of the model, merged as scvi-tools merges them; those that cannot be served are refused."""
    given: dict[str, Any] = {k: v for k, v in saved.items() if k not in ("kwargs", "non_kwargs")}
    given |= saved.get("non_kwargs", {})
    for more in saved.get("kwargs", {}).values():
        given |= more if isinstance(more, dict) else {}
    refused = {
        "gene_likelihood": lambda value: value not in ("zinb", "nb", "poisson"),
        "latent_distribution": lambda value: value != "normal",
        "use_observed_lib_size": lambda value: not value,
        "use_size_factor_key": bool,
    }
    wrong = [
        f"{name}={given[name]!r}" for name, is_refused in refused.items() if name in given and is_refused(given[name])
    ]
    known = (*DEFAULTS, *WITHOUT_EFFECT, *refused)
    wrong += [
        f"{name}={value!r}" for name, value in given.items() if name not in known and value is not None and value != {}
    ]
    if wrong:
        raise UnsupportedOption(
            f"{folder} was made with {', '.join(wrong)}, which cannot be served. See docs/import.md."
        )
    return {name: given.get(name, default) for name, default in DEFAULTS.items()}


def _check_setup(folder: Path, registry: dict[str, Any]) -> None:
    setup = registry.get("setup_args", {})
    # Both would be needed of every cell that is sent.
    for key in ("size_factor_key", "continuous_covariate_keys"):
        if setup.get(key):
            raise UnsupportedOption(
                f"{folder} was set up with {key}={setup[key]!r}, which cannot be served. See docs/import.md."
            )


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in np.asarray(values).ravel())


def _array(values: Any) -> np.ndarray:
    return np.zeros(0) if values is None else np.asarray(values)
