"""The manifest and the files of a run, compared with torch in float64 before anybody sees them."""

from typing import Any

import numpy as np
import torch

from service.contract import ambiguous_names, artifact
from service.contract.annotation import LabelLevel
from service.contract.manifest import (
    BatchPolicy,
    DataSource,
    Genes,
    Golden,
    Manifest,
    Modality,
    Parity,
    Provenance,
)
from service.inference.session import Runtime, Session
from training import archive, explanation, imputation, missing_genes, parity, reference_space, saliency
from training.data import source
from training.data.prepared import encode_cells
from training.data.splits import TRAIN
from training.exported import exported_graphs
from training.families.family import Graph, Imputed
from training.gene_names import gene_table, has_ensembl_ids
from training.onnx_graph import Precision, signature, to_onnx
from training.parity import Arrays
from training.quantise import N_RANGE, precision_of, quantise_encoders, variant_name
from training.run import Run
from training.sparse_input import with_values

GENES, GOLDEN = "genes.tsv", "golden.npz"
AMBIGUOUS = "reference/ambiguous_names.tsv"


def build(
    run: Run, version: str, precision: Precision = "float32", for_serving: bool = True
) -> tuple[Manifest, dict[str, bytes]]:
    """Manifest and files of a run, compared with torch in float64 on held-out cells; the card is still empty.

    Args:
        run: a finished run.
        version: of the artifact.
        precision: of the encoder's first layer; other than float32 is another model, and has another name.
        for_serving: false for a model that is thrown away again, without what annotating needs not and takes the most time: the picture of
            the reference, explanations, impacts, and what missing genes do.

    Raises:
        NothingToQuantise: the encoder has no layer to quantise.
        OutsideTolerance: they disagree.
    """
    torch.manual_seed(run.config.seed)
    graphs = exported_graphs(run.family, run.config.export.spread, run.config.label_levels, run.calibration)
    inputs = with_values(run.family, held_out_inputs(run, run.config.export.n_parity))
    golden_cells = with_values(run.family, golden_inputs(run))
    explaining = explanation.graph(run.family, run.prepared) if for_serving else None
    if explaining is not None:
        graphs[explanation.NAME] = explaining
        inputs |= explanation.example_inputs(explaining, inputs)
        golden_cells |= explanation.example_inputs(explaining, golden_cells)
    example = {name: torch.from_numpy(array[:2]) for name, array in inputs.items()}
    example["latent"] = torch.zeros(2, run.config.hyperparameters.n_latent)
    contents = {f"{name}.onnx": to_onnx(graph, example) for name, graph in graphs.items()}
    if precision == "int8":
        cells = run.prepared.train.counts
        chosen = cells[np.unique(np.linspace(0, cells.shape[0] - 1, N_RANGE).astype(int))].toarray()
        contents = quantise_encoders(contents, with_values(run.family, {"counts": chosen}))
    signatures = {
        name: signature(contents[f"{name}.onnx"], f"{name}.onnx", precision_of(name, precision)) for name in graphs
    }
    sessions = {name: Session(contents[graph.file], graph, Runtime(), graph.file) for name, graph in signatures.items()}
    space = reference_space.build(run, sessions, for_serving)
    if space is not None and space.projector is not None:
        graphs["project"] = Graph(space.projector, ("latent",), ("umap",))
        contents["project.onnx"] = to_onnx(graphs["project"], example)
        signatures["project"] = signature(contents["project.onnx"], "project.onnx")
        sessions["project"] = Session(
            contents["project.onnx"], signatures["project"], Runtime(), signatures["project"].file
        )
    input_names = {name: graph.inputs for name, graph in graphs.items()}
    differences = parity.compare(
        parity.run_sessions(sessions, input_names, inputs), parity.run_torch(graphs, inputs), precision
    )
    golden = parity.run_sessions(sessions, input_names, golden_cells)
    golden_tolerance = {
        f"{name}/{tensor.name}": parity.tolerance(f"{name}/{tensor.name}", golden[f"{name}/{tensor.name}"], precision)
        for name, graph in signatures.items()
        for tensor in graph.outputs
    }
    table, ambiguous = gene_table(run.family, run.prepared, run.config.species)
    levels = label_levels(run) if "classify" in graphs else ()
    calibration = run.calibration
    contents |= {GENES: table.dump(), GOLDEN: archive.dump(golden), artifact.CARD: b""}
    contents |= {AMBIGUOUS: ambiguous_names.dump(ambiguous)} if ambiguous else {}
    contents |= space.contents if space is not None else {}
    if calibration is not None and calibration.conformal is not None:
        contents[calibration.conformal.file] = archive.dump(calibration.scores)
    impact, effect_of_missing = None, None
    if explaining is not None:
        impact, impact_table = saliency.build(run, explaining.module, table)
        contents[impact.file] = archive.dump(impact_table.arrays())
        known = missing_genes.Graphs(sessions, signatures, levels[0].name if levels else None)
        effect_of_missing = missing_genes.measure(run, known, table.encoder_weight)
    manifest = Manifest(
        name=variant_name(run.config.name, precision),
        version=version,
        family=run.config.family,
        summary=run.config.summary,
        licence=run.config.licence,
        n_latent=run.config.hyperparameters.n_latent,
        genes=Genes(
            file=GENES,
            n_genes=len(table),
            id_type="ensembl" if has_ensembl_ids(run.prepared) else "symbol",
            species=run.config.species,
            digest=table.digest,
            min_gene_overlap=run.config.export.min_gene_overlap,
            ambiguous_names=AMBIGUOUS if ambiguous else None,
        ),
        graphs=signatures,
        batch=batch_policy(run),
        labels=levels,
        calibration=calibration.levels if calibration else {},
        conformal=calibration.conformal if calibration else None,
        unknown=calibration.unknown if calibration else None,
        modalities=tuple(modality(run, found) for found in run.family.imputes),
        missing_genes=effect_of_missing,
        reference=space.manifest if space is not None else None,
        metrics=space.metrics if space is not None else {},
        impact=impact,
        golden=Golden(file=GOLDEN, tolerance=golden_tolerance),
        parity=Parity(n_cells=len(inputs["counts"]), outputs=differences),
        provenance=provenance(run),
        files=artifact.describe(contents),
    )
    return manifest, contents


def batch_policy(run: Run) -> BatchPolicy:
    """Names of the batches, and what becomes of others."""
    average, wanted = run.family.average_batch, run.config.export
    unseen = wanted.unseen_batch or ("refuse" if average is None else "default")
    return BatchPolicy(
        names=run.prepared.batches, decode_default=wanted.decode_default, average_index=average, unseen=unseen
    )


def label_levels(run: Run) -> tuple[LabelLevel, ...]:
    """Those of the data, and then those of the family's own."""
    own = (
        LabelLevel(name=name, classes=classes, ontology_ids=(None,) * len(classes))
        for name, classes in run.family.own_levels.items()
    )
    return run.config.label_levels + tuple(own)


def modality(run: Run, imputed: Imputed) -> Modality:
    """What decode gives beside expression, and how well it does on held-out cells."""
    metric, quality = imputation.score(run, imputed)
    return Modality(
        name=imputed.name, features=imputed.features, unit=imputed.unit, quality_metric=metric, quality=quality
    )


def held_out_inputs(run: Run, n_cells: int) -> Arrays:
    """Inputs of at most `n_cells` held-out cells, spread evenly over all of them; of training cells where none are held out."""
    positions = run.held_out if len(run.held_out) else run.split.positions(run.reference, TRAIN)
    chosen = positions[np.unique(np.linspace(0, len(positions) - 1, min(n_cells, len(positions))).astype(int))]
    cells = run.reference[chosen]
    genes = cells.var_names.get_indexer(run.prepared.var.index)
    found = encode_cells(run.config, cells, genes, run.prepared.batches)
    counts = found.counts.toarray()
    # A cell of a held-out batch is decoded as the average, or else as one of the first: any will do to compare two runtimes.
    batch = np.where(found.batch < 0, run.family.average_batch or 0, found.batch)
    return {"counts": counts, "library": counts.sum(axis=1), "batch": batch}


def golden_inputs(run: Run) -> Arrays:
    """Inputs of the golden cells: real ones, held out where any are, and an empty cell."""
    inputs = held_out_inputs(run, run.config.export.n_golden)
    return {name: np.concatenate([array, np.zeros_like(array[:1])]) for name, array in inputs.items()}


def provenance(run: Run) -> Provenance:
    """Where the model comes from."""
    found: dict[str, Any] = run.provenance
    return Provenance(
        created=found["created"],
        command=found["command"],
        code_commit=found["code_commit"],
        data=tuple(
            DataSource(
                name=name,
                sha256=found["data"][name],
                n_cells=int((run.reference.obs["dataset"] == name).sum()),
                licence=source.licence(data),
            )
            for data, name in zip(run.config.data, run.config.datasets, strict=True)
        ),
        config=run.config.model_dump(mode="json"),
        seed=found["seed"],
        packages=found["packages"],
        hardware=found["hardware"],
    )
