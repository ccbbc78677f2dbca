"""What manifest.json holds: pydantic models that check themselves, and no input or output.

docs/artifact.md is this file in prose. Unknown fields are refused, so that a manifest never says something that nobody reads.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

SCHEMA_VERSION = 1

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# One path component, never a path: an artifact cannot name a file outside its directory. Folders are spelled out by `reference/…`.
FileName = Annotated[str, StringConstraints(pattern=r"^(reference/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


_OTHER_COLUMNS = ("expression", "is_empty")


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


class LabelLevel(Strict):
    """One set of classes that `classify` tells apart."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """The graph's output is called probabilities_<name>."""

    classes: tuple[str, ...]
    """In output order."""

    ontology_ids: tuple[str | None, ...]
    """Cell Ontology term of each class, where it has one."""

    @model_validator(mode="after")
    def _check(self) -> "LabelLevel":
        if len(self.classes) != len(self.ontology_ids):
            raise ValueError(f"{len(self.classes)} classes but {len(self.ontology_ids)} ontology ids")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes repeat")
        return self


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


class Difference(Strict):
    """Largest differences between ONNX Runtime (float32) and torch (float64) over held-out cells."""

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
    graphs: dict[Literal["encode", "decode", "classify", "explain", "project"], Graph]
    batch: BatchPolicy
    labels: tuple[LabelLevel, ...] = ()
    """The first level is what `predicted_labels` answers."""

    modalities: tuple[Modality, ...] = ()
    """What `decode` gives beside `expression`."""

    impact: Impact | None = None
    """Of genes and gene sets; null for a model without."""

    calibration: dict[str, Any] = {}
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
        named += [self.impact.file] if self.impact else []
        if missing := sorted(set(named) - set(self.files)):
            raise ValueError(f"files does not list {', '.join(missing)}")
        proven = {f"{name}/{output.name}" for name, graph in self.graphs.items() for output in graph.outputs}
        if unlike := sorted(proven ^ set(self.golden.tolerance)):
            raise ValueError(f"golden.tolerance must name every output and nothing else; it differs in {unlike[0]}")
        if "encode" not in self.graphs:
            raise ValueError("graphs lacks 'encode'")
        for key in ("encoder_batch", "decode_default"):
            name = getattr(self.batch, key)
            if name is not None and name not in ("average", *self.batch.names):
                raise ValueError(f"batch.{key} '{name}' is no batch of the reference")
        decoded = {output.name: output for output in self.graphs["decode"].outputs} if "decode" in self.graphs else {}
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
        return self

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
