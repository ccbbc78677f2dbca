"""What manifest.json holds: pydantic models that check themselves, and no input or output.

docs/artifact.md is this file in prose. Unknown fields are refused, so that a manifest never says something that nobody reads.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from service.contract.annotation import Conformal, LabelLevel, LevelCalibration, UnknownDetection, check_parents

SCHEMA_VERSION = 1
MAX_NEIGHBOURS = 100
"""Reference cells that a client may ask for, and that may vote."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# One path component, never a path: an artifact cannot name a file outside its directory. Folders are spelled out by `reference/…`.
FileName = Annotated[str, StringConstraints(pattern=r"^(reference/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


_OTHER_COLUMNS = ("expression", "expression_variance", "expression_sd", "is_empty")


class Strict(BaseModel):
    """Immutable, finite, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class File(Strict):
    """One file of the version directory."""

    sha256: Sha256
    n_bytes: Annotated[int, Field(ge=0)]


class Tensor(Strict):
    """An input or output of a graph."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | Literal["n"], ...]
    """One entry per axis; "n" is the number of cells."""


class Graph(Strict):
    """One ONNX file and its signature."""

    file: FileName
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    precision: Literal["float32", "int8"] = "float32"
    """In which numbers its largest product is multiplied. Inputs and outputs are what their dtype says."""


class Genes(Strict):
    """The genes of the model, in graph order."""

    file: FileName
    """Table with the columns gene_id, gene_symbol, aliases ("|"-joined), encoder_weight."""

    n_genes: Annotated[int, Field(gt=0)]
    id_type: Literal["ensembl", "symbol"]
    species: str
    """Latin name with an underscore, as Ensembl writes it: homo_sapiens."""

    digest: Sha256
    """sha256 of the gene ids in order, newline-joined: two models with the same digest take the same columns."""

    min_gene_overlap: Annotated[float, Field(gt=0, le=1)]
    """Share of the model's genes that a query must have. Below it the query is refused."""

    ambiguous_names: FileName | None = None
    """Table with the columns name, gene_ids ("|"-joined), is_symbol: names that may mean genes of the model and are not taken for them."""


Shares = tuple[Annotated[float, Field(ge=0, le=1)], ...]


class MissingGenes(Strict):
    """How far cells move when genes are missing: measured on cells that were held out, by taking genes away from them.

    The columns have one entry per value of `weight`, and never fall.
    """

    n_cells: Annotated[int, Field(gt=0)]
    n_sets: Annotated[int, Field(gt=0)]
    """Sets of genes that were taken away: drawn at random, the heaviest, the lightest and the most expressed."""

    neighbour_distance: Annotated[float, Field(gt=0)]
    """Median distance in the latent space between such a cell and its 15 nearest; displacements are in this unit."""

    weight: Annotated[Shares, Field(min_length=2)]
    """Share of the encoder's first layer that the missing genes hold, rising from 0."""

    displacement_median: tuple[Annotated[float, Field(ge=0)], ...]
    displacement_90: tuple[Annotated[float, Field(ge=0)], ...]
    """Nine cells in ten moved less."""

    label_changes: Shares | None = None
    """Share of cells whose label of the first level became another; None for a model without labels."""

    @model_validator(mode="after")
    def _check(self) -> "MissingGenes":
        columns = (self.displacement_median, self.displacement_90, self.label_changes)
        for column in columns:
            if column is not None and (len(column) != len(self.weight) or list(column) != sorted(column)):
                raise ValueError("the columns must have one entry per weight and never fall")
        if self.weight[0] != 0 or list(self.weight) != sorted(set(self.weight)):
            raise ValueError("weight must rise from 0")
        return self


class BatchPolicy(Strict):
    """How technical batches enter the graphs."""

    names: tuple[str, ...]
    """Batches of the reference, by the index that the graphs take."""

    encoder_uses_batch: Literal[False] = False
    """schema_version 1 holds batch-free encoders only, so that an unseen batch needs no training."""

    encoder_batch: str | None = None
    """Batch as which every cell is encoded, where the network that was exported takes one: one of `names`, or "average" for the mean of
    their codes. None: it takes none. The graph holds it; a client sends none."""

    decode_default: str = "average"
    """Batch for which expression is reconstructed: one of `names`, or "average" over all of them."""

    average_index: Annotated[int, Field(ge=0)] | None = None
    """Index with which `decode` takes the average batch itself; null where the average is the mean of the expressions of all `names`."""

    unseen: Literal["refuse", "default"] = "refuse"
    """What a client gets who names a batch that is not in `names`: a refusal, or `decode_default` and a word of it in the answer's head."""


class Modality(Strict):
    """Something else than expression that `decode` gives for each cell, for example its surface proteins."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """Of the output of `decode`, and of the column in the answer."""

    features: Annotated[tuple[str, ...], Field(min_length=1)]
    """What its values are of, in output order."""

    unit: str
    """What a value is."""

    quality_metric: str = ""
    """What `quality` measures, and on which cells."""

    quality: dict[str, float] = {}
    """By feature; a feature on which it cannot be measured is left out."""

    @model_validator(mode="after")
    def _check(self) -> "Modality":
        if self.name in _OTHER_COLUMNS:
            raise ValueError(f"'{self.name}' is the name of another column of the answer")
        if len(set(self.features)) != len(self.features):
            raise ValueError("features repeat")
        if unknown := sorted(set(self.quality) - set(self.features)):
            raise ValueError(f"quality names {unknown[0]}, which is no feature")
        return self


QUANTILES = ("0.05", "0.25", "0.5", "0.75", "0.95")


class Distribution(Strict):
    """How a number is distributed over cells."""

    mean: float
    quantiles: dict[Literal["0.05", "0.25", "0.5", "0.75", "0.95"], float]
    """All five, ascending."""

    @model_validator(mode="after")
    def _check(self) -> "Distribution":
        values = [self.quantiles.get(quantile) for quantile in QUANTILES]  # type: ignore[call-overload]
        if None in values or values != sorted(values):
            raise ValueError(f"quantiles must be {', '.join(QUANTILES)}, and ascend")
        return self


class LevelProfile(Strict):
    """How the reference's cells look at one label level."""

    shares: dict[str, Annotated[float, Field(ge=0, le=1)]]
    """Of its labelled cells, by class; classes of none are left out."""

    conf_score: Distribution
    entropy: Distribution
    """Of the probabilities, over that of equal ones: 0 to 1."""

    n_held_out: Annotated[int, Field(gt=0)]
    """Cells that were not trained on, which `conf_score` and `entropy` are of: the model is too sure of the others."""


class Profile(Strict):
    """What the reference's own cells look like, so that a drift of what is sent can be seen."""

    n_cells: Annotated[int, Field(gt=0)]
    library_size: Distribution
    """Counts per cell in the genes of the model."""

    labels: dict[str, LevelProfile] = {}
    """By label level."""


class Vote(Strict):
    """How the labels of the nearest reference cells make a label of their own."""

    n_neighbours: Annotated[int, Field(gt=0, le=MAX_NEIGHBOURS)]
    weighting: Literal["uniform", "distance"]
    """distance: 1 / (1 + d² / s²) with s² the mean of the squared distances of the cell's `n_neighbours` nearest."""

    answers: dict[str, Literal["classifier", "vote"]]
    """By label level, which of the two did better on cells that neither had seen."""


class Reference(Strict):
    """The cells that the model was trained on, where its own encoder puts them."""

    latent: FileName
    """npy, float32 (n_cells, n_latent), as the graph encode gave it."""

    cells: FileName
    """Table with the columns cell_id, batch, and one per label level; one line per row of `latent`."""

    umap: FileName | None = None
    """npy, float32 (n_cells, 2): the fixed picture that `project` puts query cells on."""

    n_cells: Annotated[int, Field(gt=0)]
    n_training_cells: Annotated[int, Field(gt=0)]
    """That `n_cells` were drawn from; equal where all of them are here."""

    metric: Literal["euclidean"] = "euclidean"
    index: Literal["exact"] = "exact"
    """How neighbours are found: by the distances to all cells."""

    vote: Vote | None = None
    """None for a model without labels."""

    @model_validator(mode="after")
    def _check(self) -> "Reference":
        if self.n_training_cells < self.n_cells:
            raise ValueError(f"{self.n_cells} cells cannot be drawn from {self.n_training_cells}")
        if self.vote is not None and self.vote.n_neighbours > self.n_cells:
            raise ValueError(f"{self.vote.n_neighbours} neighbours vote, but there are {self.n_cells} cells")
        return self


class Difference(Strict):
    """Largest differences between ONNX Runtime (float32) and torch (float64) over held-out cells, or training cells where none are held out."""

    absolute: Annotated[float, Field(ge=0)]
    relative: Annotated[float, Field(ge=0)]
    tolerance: Annotated[float, Field(gt=0)]
    """Largest absolute difference with which an export is allowed."""


class Parity(Strict):
    """How the exported graphs compare with the network that was trained."""

    n_cells: Annotated[int, Field(gt=0)]
    outputs: dict[str, Difference]


class Golden(Strict):
    """Cells and the outputs that they must give on every machine that serves them."""

    file: FileName
    """npz with every input and output of every graph as `<graph>/<tensor>`; the first axis is the cells, the same for all."""

    tolerance: dict[str, Annotated[float, Field(ge=0)]]
    """Largest absolute difference allowed per output, keyed `<graph>/<tensor>`."""


class GeneSetFile(Strict):
    """A GMT file whose sets a model was looked at with."""

    name: str
    sha256: Sha256
    licence: str
    n_sets: Annotated[int, Field(ge=0)]
    """Of its sets, those with enough and not too many genes in the model."""


class Impact(Strict):
    """What each gene does to every latent unit and label, in a table."""

    file: FileName
    """npz; service/contract/impact.py says what it holds."""

    n_cells: Annotated[int, Field(gt=0)]
    """Cells of the reference that impacts are means over."""

    gene_sets: tuple[GeneSetFile, ...] = ()
    min_set_genes: Annotated[int, Field(gt=0)]
    max_set_genes: Annotated[int, Field(gt=0)]
    """Sets with fewer or more genes in the model are left out."""


class DataSource(Strict):
    """A data set that the model was trained on."""

    name: str
    sha256: dict[str, Sha256]
    """By file name, as published."""

    n_cells: int
    licence: str


class Provenance(Strict):
    """Where the model comes from, enough to make it again."""

    created: str
    """UTC, ISO 8601."""

    command: str
    code_commit: str
    data: tuple[DataSource, ...]
    config: dict[str, Any]
    seed: int
    packages: dict[str, str]
    hardware: dict[str, str]


class Manifest(Strict):
    """manifest.json."""

    schema_version: Literal[1] = 1
    name: Name
    version: Version
    family: str
    summary: str
    licence: str
    n_latent: Annotated[int, Field(gt=0)]
    genes: Genes
    graphs: dict[
        Literal["encode", "decode", "classify", "map_score", "explain", "project", "transform", "encode_values"], Graph
    ]
    """`transform` and `encode_values` are `encode` in two steps, the first of single counts: 0 becomes 0, so that it is run for the counts
    that are not zero, and `encode_values` on the matrix of what they become."""
    batch: BatchPolicy
    labels: tuple[LabelLevel, ...] = ()
    """The first level is what `predicted_labels` answers."""

    modalities: tuple[Modality, ...] = ()
    """What `decode` gives beside `expression`."""

    missing_genes: MissingGenes | None = None
    """What missing genes do to an embedding."""

    profile: Profile | None = None
    """What is sent can be compared with; null where the reference was not at hand."""

    reference: Reference | None = None
    """None: the model does not offer map."""

    impact: Impact | None = None
    """Of genes and gene sets; null for a model without."""

    calibration: dict[str, LevelCalibration] = {}
    """What was done to the probabilities, by level; a level that is not named is as the network gives it."""

    conformal: Conformal | None = None
    unknown: UnknownDetection | None = None
    thresholds: dict[str, float] = {}
    metrics: dict[str, float] = {}
    """Figures of the evaluation of this very model, by name."""

    golden: Golden
    parity: Parity
    provenance: Provenance
    files: dict[FileName, File]
    """Every file of the directory but manifest.json itself."""

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        named = [self.genes.file, self.golden.file, *(graph.file for graph in self.graphs.values())]
        if self.reference is not None:
            named += [self.reference.latent, self.reference.cells, *filter(None, [self.reference.umap])]
        named += [self.genes.ambiguous_names] if self.genes.ambiguous_names else []
        named += [self.conformal.file] if self.conformal else []
        named += [self.impact.file] if self.impact else []
        if missing := sorted(set(named) - set(self.files)):
            raise ValueError(f"files does not list {', '.join(missing)}")
        proven = {f"{name}/{output.name}" for name, graph in self.graphs.items() for output in graph.outputs}
        if unlike := sorted(proven ^ set(self.golden.tolerance)):
            raise ValueError(f"golden.tolerance must name every output and nothing else; it differs in {unlike[0]}")
        if "encode" not in self.graphs:
            raise ValueError("graphs lacks 'encode'")
        if {"transform", "encode_values"} & set(self.graphs):
            self._check_steps()
        for key in ("encoder_batch", "decode_default"):
            name = getattr(self.batch, key)
            if name is not None and name not in ("average", *self.batch.names):
                raise ValueError(f"batch.{key} '{name}' is no batch of the reference")
        decoded = {output.name: output for output in self.graphs["decode"].outputs} if "decode" in self.graphs else {}
        if (variance := decoded.get("expression_variance")) and variance.shape != ("n", self.genes.n_genes):
            raise ValueError(
                f"the output expression_variance of decode is not of shape [n, n_genes], [n, {self.genes.n_genes}]"
            )
        if "project" in self.graphs and (
            [tensor.name for tensor in self.graphs["project"].inputs] != ["latent"]
            or [(tensor.name, tensor.shape) for tensor in self.graphs["project"].outputs] != [("umap", ("n", 2))]
        ):
            raise ValueError("project does not take latent and give umap of shape [n, 2]")
        for modality in self.modalities:
            output = decoded.get(modality.name)
            if output is None or output.shape != ("n", len(modality.features)):
                raise ValueError(f"decode has no output {modality.name} of shape [n, {len(modality.features)}]")
        self._check_explain()
        outputs = (
            {output.name: output for output in self.graphs["classify"].outputs} if "classify" in self.graphs else {}
        )
        for level in self.labels:
            output = outputs.get(f"probabilities_{level.name}")
            if output is None or output.shape != ("n", len(level.classes)):
                raise ValueError(
                    f"classify has no output probabilities_{level.name} of shape [n, {len(level.classes)}]"
                )
        classes = {level.name: set(level.classes) for level in self.labels}
        for name, known in (self.profile.labels if self.profile is not None else {}).items():
            if strange := sorted(set(known.shares) - classes.get(name, set())):
                raise ValueError(f"profile.labels.{name} names {strange[0]}, which is no class")
        check_parents(self.labels)
        for part, levels in (
            ("reference.vote.answers", self.reference.vote.answers if self.reference and self.reference.vote else {}),
            ("calibration", self.calibration),
            ("conformal", self.conformal.n_cells if self.conformal else {}),
        ):
            if unknown := sorted(set(levels) - set(classes)):
                raise ValueError(f"{part} names '{unknown[0]}', which is no label level")
        if (self.unknown is not None) != ("map_score" in self.graphs):
            raise ValueError("unknown and the graph map_score come together")
        if self.unknown and [(output.name, output.shape) for output in self.graphs["map_score"].outputs] != [
            ("mapping_score", ("n",))
        ]:
            raise ValueError("map_score must have the one output mapping_score of shape [n]")
        return self

    def _check_steps(self) -> None:
        """Whether `transform` and `encode_values` fit together and can stand for `encode`."""
        if not {"transform", "encode_values"} <= set(self.graphs):
            raise ValueError("graphs has one of 'transform' and 'encode_values', and not the other")
        first, second = self.graphs["transform"], self.graphs["encode_values"]
        shapes = {tensor.name: tensor.shape for tensor in (*first.inputs, *first.outputs)}
        if not {"count", "value"} <= set(shapes) <= {"count", "library", "value"} or set(shapes.values()) != {("n",)}:
            raise ValueError("transform must take count [n], perhaps library [n], and give value [n]")
        if [(tensor.name, tensor.shape) for tensor in second.inputs] != [("values", ("n", self.genes.n_genes))]:
            raise ValueError(f"encode_values must take values [n, {self.genes.n_genes}]")
        if second.outputs != self.graphs["encode"].outputs:
            raise ValueError("encode_values must give what encode gives")

    def _check_explain(self) -> None:
        if "explain" not in self.graphs:
            return
        width = self.n_latent + sum(len(level.classes) for level in self.labels)
        wanted = {
            "counts": ("n", self.genes.n_genes),
            "direction": ("n", width),
            "position": ("n",),
            "baseline": ("n",),
            "attribution": ("n", self.genes.n_genes),
            "value": ("n",),
        }
        found = {
            tensor.name: tensor.shape for tensor in (*self.graphs["explain"].inputs, *self.graphs["explain"].outputs)
        }
        if found != wanted:
            raise ValueError(
                f"explain has tensors of shapes that do not fit n_genes, n_latent or labels: {found}, and not {wanted}"
            )

    @property
    def id(self) -> str:
        """name@version, as it is written in answers and logs."""
        return f"{self.name}@{self.version}"
