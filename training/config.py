"""One training run as one checked model. A YAML file and `--set key=value` are two ways to fill it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.data.features import RULES
from training.families import FAMILIES

Share = Annotated[float, Field(gt=0, lt=1)]


class InvalidConfig(Exception):
    """A configuration is not as documented."""


class Strict(BaseModel):
    """Immutable and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Level(Strict):
    """One set of classes to tell apart."""

    name: str
    """Column of `obs` that holds the classes, and the name of the classifier's output."""

    classes: dict[str, str | None]
    """Class → Cell Ontology id, in output order. Cells of other classes are trained on without a label."""


class Genes(Strict):
    """Which genes the model takes; chosen from training cells only."""

    rule: str = "seurat"
    """How genes are ranked: a key of RULES in data/features.py."""

    n_genes: Annotated[int, Field(gt=0)] = 2000
    """Highest-ranked genes that are kept; fewer where the data have fewer."""

    min_cells: Annotated[int, Field(ge=0)] = 3
    """Genes seen in fewer training cells of any one set are left out."""

    @model_validator(mode="after")
    def _check(self) -> "Genes":
        if self.rule not in RULES:
            raise ValueError(f"rule '{self.rule}' is not one of {', '.join(RULES)}")
        return self


class Splits(Strict):
    """Shares of the cells of each set and class that are kept from the gradient."""

    test: Share = 0.2
    """Never seen while training; the evaluation's held-out cells."""

    validation: Share = 0.1
    """Of all cells; they decide when to stop and which epoch is kept."""


class Fit(Strict):
    """How the weights are found."""

    max_epochs: Annotated[int, Field(gt=0)] = 100
    patience: Annotated[int, Field(gt=0)] = 15
    """Epochs without a better validation loss before training stops."""

    rows: Annotated[int, Field(gt=0)] = 128
    """Cells per minibatch."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["constant", "one_cycle"] = "constant"
    """one_cycle: the learning rate rises over the first tenth of all steps and then falls to nothing (Smith & Topin 2018, arXiv:1708.07120).
    It needs its max_epochs, so give it a patience of at least half of them."""

    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""

    gradient_clip: Annotated[float, Field(gt=0)] | None = 10.0
    """Largest norm of a step's gradient; larger ones are scaled down to it."""

    thinning: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Each training cell keeps a random share between 1 - thinning and 1 of its counts, so that depth carries no label."""

    gene_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of genes set to zero in each training cell, so that no single gene is relied on."""

    balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0: each cell is drawn once per epoch. 1: batches and classes are drawn equally often. Between: geometrically between."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    n_threads: Annotated[int, Field(gt=0)] = 1
    """CPU threads. Another number sums in another order and gives other last bits, so it belongs to the configuration."""

    deterministic: bool = True
    """Use deterministic algorithms only; an operation without one is an error."""


class Export(Strict):
    """What the artifact promises."""

    min_gene_overlap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the model's genes that a query must have."""

    n_golden: Annotated[int, Field(gt=0)] = 16
    """Held-out cells stored with their outputs; an empty cell is added."""

    n_parity: Annotated[int, Field(gt=0)] = 512
    """Held-out cells on which ONNX Runtime is compared with torch in float64."""


class Config(Strict):
    """A whole run."""

    name: str
    """Of the model, in the store and in URLs."""

    summary: str = ""
    """One sentence for GET /v1/models and the card."""

    licence: str = "Apache-2.0"
    """Of the exported weights."""

    species: str = "homo_sapiens"
    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of data sets; each is a technical batch."""

    labels: tuple[Level, ...] = ()
    genes: Genes = Genes()
    split: Splits = Splits()
    family: str
    model: dict[str, Any] = {}
    """Hyper-parameters of the family; those left out have the family's defaults."""

    fit: Fit = Fit()
    export: Export = Export()
    seed: int = 0
    """Of the split, the weights, the order of cells and all noise."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.family not in FAMILIES:
            raise ValueError(f"family '{self.family}' is not one of {', '.join(FAMILIES)}")
        FAMILIES[self.family].defaults.model_validate(self.model)
        return self

    @property
    def hyperparameters(self) -> Any:
        """The family's hyper-parameters, checked and with its defaults."""
        return FAMILIES[self.family].defaults.model_validate(self.model)

    def dump(self) -> str:
        """YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file.
        overrides: `key.sub=value`, the value in YAML; they win over the file.

    Raises:
        InvalidConfig: no such file, not YAML, or not as `Config` says: every fault at once.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidConfig(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise InvalidConfig(f"{path} must be a mapping of settings, not {type(document).__name__}.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise InvalidConfig(f"'{override}' is not of the form key.sub=value.")
        _override(document, key, value)
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'config'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise InvalidConfig(f"{path}: {'; '.join(faults)}") from None


def _override(document: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    place = document
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InvalidConfig(f"'{key}' cannot be set: {parent} is a value, not a section.")
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"The value of '{key}' is not YAML: {error}") from None
