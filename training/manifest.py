"""The manifest and the files of a run, compared with torch in float64 before anybody sees them."""

from typing import Any

import numpy as np
import torch

from service.contract import artifact
from service.contract.manifest import (
    BatchPolicy,
    DataSource,
    Genes,
    Golden,
    LabelLevel,
    Manifest,
    Modality,
    Parity,
    Provenance,
)
from service.inference.session import Runtime, Session
from training import archive, explanation, imputation, parity, saliency
from training.data import source
from training.data.prepared import encode_cells
from training.data.splits import TEST, VALIDATION
from training.families.family import Imputed
from training.gene_names import gene_table, has_ensembl_ids
from training.onnx_graph import signature, to_onnx
from training.parity import Arrays
from training.run import Run

GENES, GOLDEN = "genes.tsv", "golden.npz"


def build(run: Run, version: str) -> tuple[Manifest, dict[str, bytes]]:
    """Manifest and files of a run, compared with torch in float64 on held-out cells; the card is still empty.

    Raises:
        OutsideTolerance: they disagree.
    """
    torch.manual_seed(run.config.seed)
    graphs = {**run.family.graphs(), explanation.NAME: explanation.graph(run.family, run.prepared)}
    inputs = held_out_inputs(run, run.config.export.n_parity)
    inputs |= explanation.example_inputs(graphs[explanation.NAME], inputs)
    example = {name: torch.from_numpy(array[:2]) for name, array in inputs.items()}
    example["latent"] = torch.zeros(2, run.config.hyperparameters.n_latent)
    contents = {f"{name}.onnx": to_onnx(graph, example) for name, graph in graphs.items()}
    signatures = {name: signature(contents[f"{name}.onnx"], f"{name}.onnx") for name in graphs}
    sessions = {name: Session(contents[graph.file], graph, Runtime(), graph.file) for name, graph in signatures.items()}
    input_names = {name: graph.inputs for name, graph in graphs.items()}
    differences = parity.compare(parity.run_sessions(sessions, input_names, inputs), parity.run_torch(graphs, inputs))
    golden_cells = golden_inputs(run)
    golden_cells |= explanation.example_inputs(graphs[explanation.NAME], golden_cells)
    golden = parity.run_sessions(sessions, input_names, golden_cells)
    golden_tolerance = {
        f"{name}/{tensor.name}": parity.tolerance(f"{name}/{tensor.name}", golden[f"{name}/{tensor.name}"])
        for name, graph in signatures.items()
        for tensor in graph.outputs
    }
    table = gene_table(run.family, run.prepared, run.config.species)
    impact, impact_table = saliency.build(run, graphs[explanation.NAME].module, table)
    contents |= {GENES: table.dump(), GOLDEN: archive.dump(golden), artifact.CARD: b""}
    contents[impact.file] = archive.dump(impact_table.arrays())
    manifest = Manifest(
        name=run.config.name,
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
        ),
        graphs=signatures,
        batch=batch_policy(run),
        labels=label_levels(run) if "classify" in graphs else (),
        modalities=tuple(modality(run, found) for found in run.family.imputes),
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
    named = tuple(
        LabelLevel(name=level.name, classes=tuple(level.classes), ontology_ids=tuple(level.classes.values()))
        for level in run.config.labels
    )
    own = (
        LabelLevel(name=name, classes=classes, ontology_ids=(None,) * len(classes))
        for name, classes in run.family.own_levels.items()
    )
    return named + tuple(own)


def modality(run: Run, imputed: Imputed) -> Modality:
    """What decode gives beside expression, and how well it does on held-out cells."""
    metric, quality = imputation.score(run, imputed)
    return Modality(
        name=imputed.name, features=imputed.features, unit=imputed.unit, quality_metric=metric, quality=quality
    )


def held_out_inputs(run: Run, n_cells: int) -> Arrays:
    """Inputs of at most `n_cells` held-out cells, spread evenly over all of them."""
    positions = run.split.positions(run.reference, TEST, VALIDATION)
    chosen = positions[np.unique(np.linspace(0, len(positions) - 1, min(n_cells, len(positions))).astype(int))]
    cells = run.reference[chosen]
    genes = cells.var_names.get_indexer(run.prepared.var.index)
    found = encode_cells(run.config, cells, genes, run.prepared.batches)
    counts = found.counts.toarray()
    # A cell of a held-out batch is decoded as the average, or else as one of the first: any will do to compare two runtimes.
    batch = np.where(found.batch < 0, run.family.average_batch or 0, found.batch)
    return {"counts": counts, "library": counts.sum(axis=1), "batch": batch}


def golden_inputs(run: Run) -> Arrays:
    """Inputs of the golden cells: real ones that were held out, and an empty cell."""
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
