"""A saved SCVI or SCANVI as an artifact, without scvi-tools and without running its pickle."""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract import ambiguous_names, artifact
from service.contract.ambiguous_names import Ambiguous
from service.contract.annotation import LabelLevel
from service.contract.gene_table import GeneTable
from service.contract.manifest import BatchPolicy, DataSource, Genes, Golden, Manifest, Parity, Provenance
from service.contract.store import DEFAULT, ModelId, Store
from service.inference import model as serving
from service.inference.session import Runtime, Session
from training import archive, parity
from training.config import DataFile
from training.data import registry, source
from training.export import next_version
from training.gene_names import find_aliases, find_ambiguous, read_hgnc
from training.importers import scvi_card
from training.importers.scvi_file import SavedScvi, find_model_file, read_scvi
from training.importers.scvi_network import AVERAGE, BatchChoice, ScviNetwork
from training.onnx_graph import Precision, signature, to_onnx
from training.parity import Arrays
from training.quantise import N_RANGE, precision_of, quantise_encoders, variant_name
from training.run import describe_environment
from training.sparse_input import serving_graphs, with_values

GENES, GOLDEN, AMBIGUOUS = "genes.tsv", "golden.npz", "reference/ambiguous_names.tsv"
N_CELLS, N_GOLDEN = 256, 16
LIBRARY_SIZE = 2_000
REFERENCE_TOLERANCE = {"latent": 1e-4, "probabilities": 1e-5, "expression": 1e-3}
"""Largest difference from scvi-tools' own answer that is allowed; of expression, as a share of its largest value."""

_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?")
_TIMEOUT = 600


class BatchNeeded(Exception):
    """The model wants to know the batch or a covariate of a cell, and nobody said what a new cell is taken for."""


class NotScviToolsAnswer(Exception):
    """The imported model gives other numbers than scvi-tools, or scvi-tools could not be asked."""


@dataclass(frozen=True)
class Import:
    """What is wanted of an import."""

    name: str
    batch: str | None = None
    """For a model whose encoder takes the batch: a batch, or "average". None: such a model is refused."""

    covariates: Mapping[str, str] | None = None
    """Column → category; columns left out are averaged, where `batch` is given."""

    level: str = "cell_type"
    species: str = "homo_sapiens"
    licence: str = "unknown"
    summary: str = ""
    min_gene_overlap: float = 0.5
    cells: Path | None = None
    """File of raw counts to compare with; None: cells are drawn from the model itself."""

    precision: Precision = "float32"
    """Of the encoder's first layer. int8 gives another model, `<name>-int8`; the range of its input is that of the cells above."""

    scvi_python: Path | None = None
    """Interpreter with scvi-tools, which is then asked for its own answer. It runs the pickle: name one only for a file that you trust."""


def import_scvi(folder: Path, wanted: Import, root: Path, version: str | None = None) -> Path:
    """Write a saved model into the store.

    Args:
        folder: what `model.save` wrote.
        wanted: name, batch and the rest.
        root: the models_store.
        version: its name; None for the next integer.

    Returns:
        The version directory.

    Raises:
        NotAnScviModel, UnsupportedOption, UnsafePickle: as `read_scvi` does.
        BatchNeeded: the model takes a batch or covariates, and none is named; or one that it does not know.
        NotScviToolsAnswer: scvi-tools was asked and gives other numbers.
        NothingToQuantise: int8 is wanted of an encoder without a layer.
        OutsideTolerance: ONNX Runtime and torch in float64 disagree.
    """
    saved = read_scvi(folder)
    choice = choose_batch(saved, wanted, folder)
    network = ScviNetwork(saved, choice, wanted.level).eval()
    store, name = Store(root), variant_name(wanted.name, wanted.precision)
    version = version or next_version(store, name)
    inputs = probe_inputs(saved, network, wanted.cells)
    differences = compare_with_scvi(folder, saved, network, choice, inputs, wanted) if wanted.scvi_python else {}
    manifest, contents = build(folder, saved, network, choice, wanted, version, inputs, differences)
    with tempfile.TemporaryDirectory() as scratch:
        # Proved elsewhere first, so that a failure leaves nothing in the store.
        serving.load(artifact.read(artifact.write(Path(scratch), manifest, contents)), Runtime())
    is_first = not store.versions(name)
    path = artifact.write(root, manifest, contents)
    if is_first:
        store.set_alias(ModelId(name, version), DEFAULT)
    return path


def choose_batch(saved: SavedScvi, wanted: Import, folder: Path) -> BatchChoice:
    """As what new cells are encoded.

    Raises:
        BatchNeeded: see `import_scvi`.
    """
    takes_batch = saved.options["encode_covariates"]
    given = dict(wanted.covariates or {})
    if saved.needs_batch and wanted.batch is None:
        what = [*([f"the batch ('{saved.batch_key}': {_few(saved.batches)})"] if takes_batch else []),
                *(f"'{key}' ({_few(names)})" for key, names in saved.covariates.items())]  # fmt: skip
        raise BatchNeeded(
            f"{folder} wants to know {' and '.join(what)} of each cell, which nobody knows of a new one. Name a batch with --batch, or "
            f"take --batch {AVERAGE}; it will be written into the manifest."
        )
    if wanted.batch not in (None, AVERAGE, *saved.batches):
        raise BatchNeeded(f"{folder} knows no batch '{wanted.batch}'. It knows {_few(saved.batches)}, and {AVERAGE}.")
    for key, value in given.items():
        if value not in (AVERAGE, *saved.covariates.get(key, ())):
            known = "; ".join(f"{name}: {_few(names)}" for name, names in saved.covariates.items()) or "no covariates"
            raise BatchNeeded(f"{folder} knows no {key}={value}. It knows {known}.")
    only = saved.batches[0] if len(saved.batches) == 1 else wanted.batch
    return BatchChoice(only if takes_batch else None, {key: given.get(key, AVERAGE) for key in saved.covariates})


def probe_inputs(saved: SavedScvi, network: ScviNetwork, cells: Path | None, n_cells: int = N_CELLS) -> Arrays:
    """counts, library and batch of `n_cells` cells to compare with: real ones where there are, else drawn from the model itself.

    The last of them is empty.
    """
    generator = np.random.default_rng(0)
    if cells is not None:
        found = source.read(DataFile(name="cells", path=cells))
        position = found.var_names.get_indexer(list(saved.genes))
        rows = np.sort(generator.permutation(found.n_obs)[:n_cells])
        values = found.X[rows].toarray()
        counts = np.where(position >= 0, values[:, position], 0).astype(np.float32)
    else:
        latent = torch.from_numpy(generator.normal(size=(n_cells, network.n_latent)).astype(np.float32))
        batch = torch.from_numpy(generator.integers(len(saved.batches), size=n_cells))
        library = torch.from_numpy(LIBRARY_SIZE * generator.uniform(0.2, 2.0, n_cells).astype(np.float32))
        with torch.no_grad():
            counts = generator.poisson(network.decode(latent, library, batch).double().numpy()).astype(np.float32)
    counts = np.concatenate([counts, np.zeros_like(counts[:1])])
    return {
        "counts": counts,
        "library": counts.sum(axis=1),
        "batch": generator.integers(len(saved.batches), size=len(counts)),
    }


def compare_with_scvi(
    folder: Path, saved: SavedScvi, network: ScviNetwork, choice: BatchChoice, inputs: Arrays, wanted: Import
) -> dict[str, float]:
    """Largest differences from scvi-tools itself, by output; it is asked in a process of its own.

    Raises:
        NotScviToolsAnswer: they are too large, or it fails.
    """
    assert wanted.scvi_python is not None
    filled = inputs["library"] > 0  # scvi-tools takes the logarithm of the library
    asked = {name: array[filled] for name, array in inputs.items()}
    codes, covariates = question(saved, choice, asked["batch"])
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        np.savez(
            place / "question.npz", counts=asked["counts"], batch=asked["batch"], encode=codes, covariates=covariates
        )
        script = Path(__file__).with_name("ask_scvi.py")
        command = [str(wanted.scvi_python), str(script), str(find_model_file(folder).parent), str(place)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_TIMEOUT)  # noqa: S603 - the user's own interpreter
        if done.returncode:
            raise NotScviToolsAnswer(f"scvi-tools could not be asked about {folder}: {done.stderr.strip()[-500:]}")
        with np.load(place / "answer.npz", allow_pickle=False) as arrays:
            answer = {name: arrays[name] for name in arrays.files}
        version = json.loads((place / "answer.json").read_text())["version"]
    differences = compare_answer(network, asked, answer)
    for name, found in differences.items():
        if not found <= REFERENCE_TOLERANCE[name]:
            raise NotScviToolsAnswer(
                f"{name} differs by {found:.3g} from scvi-tools {version}; {REFERENCE_TOLERANCE[name]:g} is allowed. Nothing was imported."
            )
    return {f"scvi_tools_{name}_difference": value for name, value in differences.items()}


def question(
    saved: SavedScvi, choice: BatchChoice, batch: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Codes of the batch for the encoder, (n_cells, n_batches), and of the covariates one after the other, (n_cells, sum of categories)."""

    def code(names: tuple[str, ...], name: str) -> NDArray[np.float32]:
        return (
            np.full(len(names), 1 / len(names), np.float32)
            if name == AVERAGE
            else np.eye(len(names), dtype=np.float32)[names.index(name)]
        )

    chosen = code(saved.batches, choice.encoder_batch or AVERAGE)
    covariates = [code(names, choice.covariates[key]) for key, names in saved.covariates.items()]
    joined = np.concatenate(covariates) if covariates else np.zeros(0, np.float32)
    return np.tile(chosen, (len(batch), 1)), np.tile(joined, (len(batch), 1))


def compare_answer(network: ScviNetwork, inputs: Arrays, answer: Arrays) -> dict[str, float]:
    """Largest differences between the imported network and an answer of scvi-tools, both in float32."""
    with torch.no_grad():
        latent = network.encode(torch.from_numpy(inputs["counts"]))
        found = {
            "latent": latent.numpy(),
            "expression": network.decode(
                latent, torch.from_numpy(inputs["library"]), torch.from_numpy(inputs["batch"])
            ).numpy(),
        }
        if "probabilities" in answer:
            found["probabilities"] = network.graphs()["classify"].module(latent).numpy()
    size = {"expression": max(float(np.abs(answer["expression"]).max()), 1e-6)}
    return {name: float(np.abs(found[name] - answer[name]).max()) / size.get(name, 1.0) for name in found}


def build(
    folder: Path,
    saved: SavedScvi,
    network: ScviNetwork,
    choice: BatchChoice,
    wanted: Import,
    version: str,
    inputs: Arrays,
    metrics: dict[str, float],
) -> tuple[Manifest, dict[str, bytes]]:
    """Manifest and files, compared with torch in float64.

    Raises:
        OutsideTolerance: they disagree.
    """
    inputs = with_values(network, inputs)
    graphs = serving_graphs(network)
    example = {name: torch.from_numpy(array[:2]) for name, array in inputs.items()}
    example["latent"] = torch.zeros(2, network.n_latent)
    contents = {f"{name}.onnx": to_onnx(graph, example) for name, graph in graphs.items()}
    precision = wanted.precision
    if precision == "int8":
        contents = quantise_encoders(
            contents, with_values(network, probe_inputs(saved, network, wanted.cells, N_RANGE))
        )
    signatures = {
        name: signature(contents[f"{name}.onnx"], f"{name}.onnx", precision_of(name, precision)) for name in graphs
    }
    sessions = {name: Session(contents[graph.file], graph, Runtime(), graph.file) for name, graph in signatures.items()}
    names = {name: graph.inputs for name, graph in graphs.items()}
    differences = parity.compare(
        parity.run_sessions(sessions, names, inputs), parity.run_torch(graphs, inputs), precision
    )
    golden = parity.run_sessions(sessions, names, {name: array[-N_GOLDEN - 1 :] for name, array in inputs.items()})
    outputs = [f"{name}/{tensor.name}" for name, graph in signatures.items() for tensor in graph.outputs]
    table, ambiguous, id_type = gene_table(saved, network, wanted.species, inputs["counts"])
    contents |= {GENES: table.dump(), GOLDEN: archive.dump(golden), artifact.CARD: b""}
    contents |= {AMBIGUOUS: ambiguous_names.dump(ambiguous)} if ambiguous else {}
    environment = describe_environment(0)
    file = find_model_file(folder)
    manifest = Manifest(
        name=variant_name(wanted.name, precision),
        version=version,
        family=saved.kind.lower(),
        summary=wanted.summary,
        licence=wanted.licence,
        n_latent=network.n_latent,
        genes=Genes(
            file=GENES,
            n_genes=len(table),
            id_type=id_type,
            species=wanted.species,
            digest=table.digest,
            min_gene_overlap=wanted.min_gene_overlap,
            ambiguous_names=AMBIGUOUS if ambiguous else None,
        ),
        graphs=signatures,
        batch=BatchPolicy(names=saved.batches, encoder_batch=choice.encoder_batch),
        labels=(
            (LabelLevel(name=wanted.level, classes=saved.labels, ontology_ids=(None,) * len(saved.labels)),)
            if saved.labels
            else ()
        ),
        metrics=metrics,
        golden=Golden(
            file=GOLDEN, tolerance={name: parity.tolerance(name, golden[name], precision) for name in outputs}
        ),
        parity=Parity(n_cells=len(inputs["counts"]), outputs=differences),
        provenance=Provenance(
            created=environment["created"],
            command=environment["command"],
            code_commit=environment["code_commit"],
            data=(
                DataSource(
                    name=folder.name,
                    sha256={file.name: hashlib.sha256(file.read_bytes()).hexdigest()},
                    n_cells=saved.n_cells,
                    licence=wanted.licence,
                ),
            ),
            config={
                "imported_from": f"scvi-tools {saved.version}",
                "model": saved.kind,
                "batch_key": saved.batch_key,
                "labels_key": saved.labels_key,
                "options": saved.options,
                "encoder_batch": choice.encoder_batch,
                "covariates": dict(choice.covariates),
            },
            seed=0,
            packages=environment["packages"],
            hardware=environment["hardware"],
        ),
        files=artifact.describe(contents),
    )
    contents[artifact.CARD] = scvi_card.write(manifest, saved, choice).encode()
    return manifest.model_copy(update={"files": artifact.describe(contents)}), contents


def gene_table(
    saved: SavedScvi, network: ScviNetwork, species: str, counts: NDArray[np.float32]
) -> tuple[GeneTable, dict[str, Ambiguous], str]:
    """The model's genes with what HGNC knows of human ones, names that are not taken, and whether ids are "ensembl" or "symbol"."""
    matches = [_ENSEMBL.fullmatch(name) for name in saved.genes]
    is_ensembl = all(matches)
    ids = [match[1] for match in matches if match] if is_ensembl else list(saved.genes)
    symbols = [""] * len(ids) if is_ensembl else list(saved.genes)
    aliases: tuple[tuple[str, ...], ...] = ((),) * len(ids)
    ambiguous: dict[str, Ambiguous] = {}
    if species == "homo_sapiens":
        hgnc = read_hgnc(registry.fetch_all(registry.find("hgnc"))["hgnc_complete_set.txt.gz"])
        aliases, ambiguous = find_aliases(ids, symbols, hgnc), find_ambiguous(ids, symbols, hgnc)
    with torch.no_grad():
        weight = network.gene_weight().norm(dim=0).double().numpy()
    weight = weight * (np.log1p(counts.astype(np.float64)).std(axis=0) + 1e-6)
    table = GeneTable(tuple(ids), tuple(symbols), aliases, (weight / weight.sum()).astype(np.float32))
    return table, ambiguous, "ensembl" if is_ensembl else "symbol"


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")
