"""One training run as one checked model. A YAML file and `--set key=value` are two ways to fill it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.contract.annotation import LabelLevel, check_parents
from training.data.features import BY_NAME, RULES
from training.data.splits import HELD_OUT, METHODS
from training.families import FAMILIES

LoggerName = Literal["tensorboard", "mlflow"]


class InvalidConfig(Exception):
    """A configuration is not as documented."""


class Strict(BaseModel):
    """Immutable and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Level(Strict):
    """One set of classes to tell apart."""

    name: str
    """Of the classifier's output, and of the column of `obs` that holds the classes."""

    column: str | None = None
    """Column of `obs` that holds the classes, where it is called otherwise."""

    data: tuple[str, ...] = ()
    """Data sets whose cells have this level, so that atlases with other label sets can be trained on together; all by default."""

    classes: dict[str, str | None]
    """Class → Cell Ontology id, in output order. Cells of other classes are trained on without a label."""

    values: dict[str, str] = {}
    """What the column says → class, where the classes are called otherwise; what is not named here is taken as it is."""

    parent: str | None = None
    """An earlier level that this one divides further. Its probabilities are then the sums of those of the classes below."""

    parents: dict[str, str] = {}
    """With `parent`: class → class of that level. Each class of that level needs one below it, which may be called the same."""

    @model_validator(mode="after")
    def _check(self) -> "Level":
        if set(self.parents) != (set(self.classes) if self.parent else set()):
            raise ValueError(f"level '{self.name}': parents must name every class, and belong to a parent level")
        if unknown := sorted(set(self.values.values()) - set(self.classes)):
            raise ValueError(f"level '{self.name}': values name '{unknown[0]}', which is none of its classes")
        return self


class DataFile(Strict):
    """Cells of your own: a file or folder in any format that training/data/formats reads."""

    name: str
    """Of the data set in this run, as the registered ones have one; cells are called <name>/<cell>."""

    path: Path
    """Absolute, or relative to where the command is run."""

    format: str | None = None
    """A key of FORMATS in training/data/formats; None: seen from the file itself."""

    columns: dict[str, str] = {}
    """Column of `obs` that the rest of the configuration knows → the file's own name for it, for example {cell_type: CellType}."""

    gene_id: str | None = None
    """Column of `var` with Ensembl ids, "index" for its index; None: a column of a usual name, or the index, where it holds Ensembl ids."""

    gene_symbol: str | None = None
    """Column of `var` with symbols, "index" for its index; None: a column of a usual name, or the index, where it holds no Ensembl ids."""

    layer: str | None = None
    """Layer that holds the raw counts; None: X."""

    backed: bool = False
    """Leave the counts of an .h5ad or .zarr on disk and train out of core; the run then has this one data set only."""

    licence: str = "unknown"
    """Of the data; it goes into the model card."""


class CellFilter(Strict):
    """Which cells are used at all; each bound is inclusive, and none is set by default."""

    min_counts: Annotated[float, Field(ge=0)] | None = None
    max_counts: Annotated[float, Field(gt=0)] | None = None
    min_genes: Annotated[int, Field(ge=0)] | None = None
    """Genes with a count above zero."""

    max_genes: Annotated[int, Field(gt=0)] | None = None
    max_mitochondrial: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of a cell's counts that genes named MT-... (any case) may have."""

    keep: dict[str, tuple[str, ...]] = {}
    """Column of `obs` → values; cells with another value are left out."""

    drop: dict[str, tuple[str, ...]] = {}
    """Column of `obs` → values; cells with one of them are left out."""

    max_cells: Annotated[int, Field(gt=0)] | None = None
    """Of each data set, drawn at random, after the other filters."""


class Genes(Strict):
    """Which genes the model takes; chosen from training cells only."""

    rule: str = "seurat"
    """How genes are ranked: a key of RULES in data/features.py."""

    n_genes: Annotated[int, Field(gt=0)] = 2000
    """Highest-ranked genes that are kept; fewer where the data have fewer."""

    min_cells: Annotated[int, Field(ge=0)] = 3
    """Genes seen in fewer training cells of any one batch are left out."""

    min_variance: Annotated[float, Field(ge=0)] = 0.0
    """Genes whose counts vary less than this over the training cells are left out (scVAE's keep_variances_above)."""

    names: tuple[str, ...] = ()
    """For the rule "names": Ensembl ids or symbols, all of which the data must have. Nothing else of this section then counts."""

    sample: Annotated[int, Field(gt=0)] = 30_000
    """Training cells that genes are ranked on, drawn at random where there are more."""

    @model_validator(mode="after")
    def _check(self) -> "Genes":
        if self.rule not in (*RULES, BY_NAME):
            raise ValueError(f"rule '{self.rule}' is not one of {', '.join((*RULES, BY_NAME))}")
        if bool(self.names) != (self.rule == BY_NAME):
            raise ValueError(f"names belong to the rule '{BY_NAME}', and it needs them")
        return self


class Splits(Strict):
    """Which cells are kept from the gradient."""

    method: str = "stratified"
    """stratified: shares of each data set and class. random: shares of each data set. sequential: the last cells of each data set, in
    the order of the file. held_out: all cells of the batches in `held_out` are tested on."""

    held_out: tuple[str, ...] = ()
    """Names of data sets or of batches. With them `test` does not count: all their cells are test cells and no others are."""

    test: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Never seen while training; the evaluation's held-out cells. 0 leaves none to evaluate on."""

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of all cells; they decide when to stop and which epoch is kept. 0: all cells are trained on, for all epochs, and the last is kept."""

    calibration: Annotated[float, Field(ge=0, lt=1)] | tuple[str, ...] = 0.0
    """Cells that probabilities, prediction sets and the threshold of unknown cells are fitted on: a share of all, or, with the method
    held_out, names of data sets or of batches, which are then neither trained nor tested on. 0: the validation cells serve for it."""

    @model_validator(mode="after")
    def _check(self) -> "Splits":
        if self.method not in METHODS:
            raise ValueError(f"method '{self.method}' is not one of {', '.join(METHODS)}")
        if bool(self.held_out) != (self.method == HELD_OUT):
            raise ValueError(f"held_out belongs to the method '{HELD_OUT}', and it needs it")
        if isinstance(self.calibration, tuple) and self.method != HELD_OUT:
            raise ValueError(f"names in calibration belong to the method '{HELD_OUT}'")
        share = 0.0 if isinstance(self.calibration, tuple) else self.calibration
        if self.test + self.validation + share >= 1:
            raise ValueError("test, validation and calibration leave no cell to train on")
        return self


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
    n_devices: Annotated[int, Field(gt=0)] = 1
    """GPUs (or processes, on the CPU) that share each minibatch, by Lightning's DDP; `rows` must be a multiple of it."""

    counts_on_device: bool = True
    """Keep the sparse counts on a GPU that has room for them, with half of its free memory left; they never leave the CPU otherwise."""

    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    n_threads: Annotated[int, Field(gt=0)] = 1
    """CPU threads. Another number sums in another order and gives other last bits, so it belongs to the configuration."""

    deterministic: bool = True
    """Use deterministic algorithms only; an operation without one is an error."""

    loggers: tuple[LoggerName, ...] = ()
    """Where losses are recorded beside metrics.csv, as files in the run directory. They change nothing of the run."""

    @model_validator(mode="after")
    def _check(self) -> "Fit":
        if self.rows % self.n_devices:
            raise ValueError(f"rows ({self.rows}) is no multiple of n_devices ({self.n_devices})")
        return self


class ReferenceCells(Strict):
    """Which training cells travel with the model, for map."""

    max_cells: Annotated[int, Field(ge=0)] = 30_000
    """At most so many, fewer where 8 MB hold fewer: all of small classes, and of large ones the same number of each. 0: none."""

    project: bool = True
    """Make a UMAP of them, and a network that puts other cells on it."""


class Export(Strict):
    """What the artifact promises."""

    min_gene_overlap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the model's genes that a query must have."""

    decode_default: str = "average"
    """Batch as which cells are reconstructed unless a client asks for another: a name, or "average"."""

    unseen_batch: Literal["refuse", "default"] | None = None
    """What a client gets who asks for a batch that was not trained on: a refusal, or `decode_default` and a word of it in the answer. None:
    default where the decoder has a code for the average batch, refuse elsewhere."""

    gene_sets: tuple[str, ...] = ()
    """GMT files whose sets the model's units and labels are compared with: registered ones by name (`python -m training datasets` lists
    them under gene_sets), or paths. docs/explain.md."""

    min_set_genes: Annotated[int, Field(gt=0)] = 5
    max_set_genes: Annotated[int, Field(gt=0)] = 500
    """Sets with fewer or more genes in the model are left out."""

    n_golden: Annotated[int, Field(gt=0)] = 16
    """Held-out cells stored with their outputs; an empty cell is added."""

    n_parity: Annotated[int, Field(gt=0)] = 512
    """Held-out cells on which ONNX Runtime is compared with torch in float64."""

    reference: ReferenceCells = ReferenceCells()
    spread: bool = True
    """Let decode give the variance of a count beside its mean, where the likelihood is one of counts."""


class Start(Strict):
    """Begin with the weights of a finished run. What it knew of genes, batches and classes is carried over by name."""

    run: str
    """Its directory. It is needed for fitting only: what is made of it is kept in the new run."""

    batches: tuple[str, ...] = ()
    """Batches of that run, which the new model keeps; taken from it where none are given."""

    keep_genes: bool = True
    """The model takes the genes of that run; those that the data lack count zero. False: genes are chosen anew from those that the data
    share."""

    train: Literal["all", "batches"] = "all"
    """batches: fit the codes of new batches only, so that every embedding and label stays as it is (as scArches; Lotfollahi et al. 2022,
    doi:10.1038/s41587-021-01001-7). It needs a weight_decay of 0, which would wear off the other codes."""


class Config(Strict):
    """A whole run."""

    name: str
    """Of the model, in the store and in URLs."""

    summary: str = ""
    """One sentence for GET /v1/models and the card."""

    licence: str = "Apache-2.0"
    """Of the exported weights."""

    limits: tuple[str, ...] = ()
    """What the model was not made for or does badly; sentences for the card."""

    cite: tuple[str, ...] = ()
    """Publications that whoever uses the model should cite; for the card."""

    species: str = "homo_sapiens"
    data: Annotated[tuple[str | DataFile, ...], Field(min_length=1)]
    """Data sets: names of registered ones, or files."""

    batch_key: str | Annotated[tuple[str, ...], Field(min_length=1)] = "dataset"
    """Column of `obs` that tells technical batches apart; by default each data set is one. Several columns, coarsest first, make batches
    of several levels (study, donor): each combination that occurs is a batch, and families may treat the levels apart."""

    cells: CellFilter = CellFilter()
    """Which cells are used at all."""

    map_symbols: bool = False
    """Give genes that have a symbol only the Ensembl id that HGNC has for it, outdated symbols included; columns that become one gene are
    summed. Human genes only."""

    labels: tuple[Level, ...] = ()
    start: Start | None = None
    """Another run to begin with."""

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
        check_parents(self.label_levels)
        if repeated := [name for name in self.datasets if self.datasets.count(name) > 1]:
            raise ValueError(f"two data sets are called '{repeated[0]}'")
        if self.start and any(isinstance(d, DataFile) and d.backed for d in self.data):
            raise ValueError("data that stay on disk (backed) cannot be read over the genes of another run (start)")
        if self.start and self.start.train == "batches" and self.fit.weight_decay:
            raise ValueError("start.train: batches needs fit.weight_decay: 0")
        if len(self.data) > 1 and (backed := [d.name for d in self.data if isinstance(d, DataFile) and d.backed]):
            raise ValueError(f"'{backed[0]}' is to stay on disk (backed), which a run of several data sets cannot do")
        return self

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(source if isinstance(source, str) else source.name for source in self.data)

    @property
    def label_levels(self) -> tuple[LabelLevel, ...]:
        """The label levels as a manifest names them."""
        return tuple(
            LabelLevel(
                name=level.name,
                classes=tuple(level.classes),
                ontology_ids=tuple(level.classes.values()),
                parent=level.parent,
                parents=tuple(level.parents[name] for name in level.classes) if level.parent else (),
            )
            for level in self.labels
        )

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
    return _checked(document, overrides, str(path))


def override(config: Config, overrides: tuple[str, ...]) -> Config:
    """The configuration with `key.sub=value` replaced; raises as `load` does."""
    return _checked(config.model_dump(mode="json"), overrides, config.name)


def _checked(document: dict[str, Any], overrides: tuple[str, ...], name: str) -> Config:
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise InvalidConfig(f"'{item}' is not of the form key.sub=value.")
        _override(document, key, value)
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'config'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise InvalidConfig(f"{name}: {'; '.join(faults)}") from None


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
