"""The model card, written from what the manifest and the run say, so that it cannot disagree with them."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from service.contract.manifest import Manifest
from training import missing_genes, reference_card
from training.calibration import card as calibration
from training.data.splits import CALIBRATION, PARTS
from training.held_out import N_DRAWS, HeldOut
from training.run import Run

_ROWS = 4096
_NOT_MEDICAL = "Not a medical device. Its answers must not guide the care of patients."
_OF_LABELS = "Cells of a type that it was not trained on get the nearest of its classes. Look at `conf_score`, and at marker genes."
_OF_UNKNOWN = (
    "Cells of a type that it was not trained on are `Unknown` only as often as the table of unknown cells says; a subtype of a class that it "
    "knows is usually taken for that class. Look at `mapping_score`, and at marker genes."
)


def write(manifest: Manifest, run: Run, held_out: HeldOut | None) -> str:
    """README.md of an artifact."""
    genes = manifest.genes
    parts = [run.split.part[name] for name in run.reference.obs_names]
    sections = [
        f"# {manifest.id}\n\n{manifest.summary or 'A reference model of single cells.'}",
        f"- Family: `{manifest.family}`, {manifest.n_latent} latent units\n"
        f"- Input: raw counts of {genes.n_genes:,} genes ({genes.id_type} ids, {genes.species}); at least "
        f"{genes.min_gene_overlap:.0%} of them must be present\n"
        f"- Graphs: {', '.join(f'`{name}`' for name in manifest.graphs)}\n"
        f"- Licence of the weights: {manifest.licence}",
        f"## Intended use\n\n{_intended_use(manifest)}\n\n## Limits\n\n{_limits(manifest, run)}",
        "## Data\n\n"
        + _table(
            ("set", "cells", "licence", "sha256"),
            [
                (
                    data.name,
                    f"{data.n_cells:,}",
                    data.licence,
                    " ".join(f"{k} `{v[:12]}…`" for k, v in data.sha256.items()),
                )
                for data in manifest.provenance.data
            ],
        )
        + "\n\nData by 10x Genomics are used under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/): 10x Genomics, "
        "https://www.10xgenomics.com/datasets. Counts were restricted to common genes and, where they were published "
        "log-normalised, restored." * any("10x Genomics" in data.licence for data in manifest.provenance.data),
        "Cells by part: "
        + ", ".join(f"{part} {parts.count(part):,}" for part in PARTS if part != CALIBRATION or part in parts)
        + ".",
    ]
    for level in manifest.labels[: len(run.config.labels)]:
        counts = run.reference.obs[level.name].value_counts()
        rows = [
            (name, ontology_id or "", f"{counts.get(name, 0):,}")
            for name, ontology_id in zip(level.classes, level.ontology_ids, strict=True)
        ]
        sections.append(f"## Labels: {level.name}\n\n" + _table(("class", "Cell Ontology", "cells"), rows))
    for level, classes in run.family.own_levels.items():
        sections.append(f"## Labels: {level}\n\n" + _own_level(run, level, classes))
    sections += _held_out(held_out) if held_out else []
    sections += calibration.sections(manifest)
    for modality in manifest.modalities:
        rows = [
            (name, f"{modality.quality[name]:.3f}" if name in modality.quality else "") for name in modality.features
        ]
        sections.append(
            f"## Imputed: {modality.name}\n\n{modality.unit}. {modality.quality_metric}.\n\n"
            + _table(("feature", "figure"), rows)
        )
    sections += reference_card.write(manifest)
    if manifest.missing_genes is not None:
        sections.append(missing_genes.section(manifest.missing_genes))
    if manifest.metrics:
        rows = [(name, f"{value:.4f}") for name, value in manifest.metrics.items()]
        sections.append(
            "## Figures\n\nOf this very model, through the runtime that serves it.\n\n"
            + _table(("figure", "value"), rows)
        )
    rows = [
        (name, f"{found.absolute:.2e}", f"{found.relative:.2e}", f"{found.tolerance:.2e}")
        for name, found in manifest.parity.outputs.items()
    ]
    if manifest.graphs["encode"].precision == "int8":
        sections.append(
            "## Precision\n\nThe encoder's first layer is multiplied in 8 bits, so embeddings and labels differ from those of "
            f"{run.config.name}; by how much is said below."
        )
    sections.append(
        f"## Served against trained\n\nLargest differences between ONNX Runtime (float32) and torch (float64) over "
        f"{manifest.parity.n_cells} {'held-out' if len(run.held_out) else 'training'} cells.\n\n"
        + _table(("output", "absolute", "relative", "allowed"), rows)
    )
    provenance = manifest.provenance
    sections.append(
        f"## Made by\n\n`{provenance.command}` at commit `{provenance.code_commit}`, seed {provenance.seed}, on "
        f"{provenance.hardware['cpu']}. Configuration and package versions are in manifest.json."
    )
    sections.append(f"## How to cite\n\n{_cite(manifest, run)}")
    return "\n\n".join(sections) + "\n"


def _held_out(held_out: HeldOut) -> list[str]:
    """Figures with intervals and the confusion matrix of each level."""
    sections = []
    for level, found in held_out.annotations.items():
        figures = [
            (one.cells, f"{one.n_cells:,}", str(one.accuracy), str(one.macro_f1))
            for one in held_out.figures
            if one.level == level
        ]
        confusion = [
            (name, *(f"{n:,}" if n else "" for n in row), f"{row[i] / row.sum():.0%}" if row.sum() else "")
            for i, (name, row) in enumerate(zip(found.classes, found.confusion, strict=True))
        ]
        sections.append(
            f"## Held-out cells: {level}\n\nOf cells that the model was not trained on, with 95 % intervals of the bootstrap over cells "
            f"({N_DRAWS:,} draws):\n\n"
            + _table(("cells", "number", "accuracy", "macro-F1"), figures)
            + "\n\nLabels in rows, the most probable class in columns, all of these cells together:\n\n"
            + _table(("", *found.classes, "right"), confusion)
            + f"\n\nExpected calibration error of these cells: {found.expected_calibration_error:.3f}."
        )
    return sections


def _cite(manifest: Manifest, run: Run) -> str:
    """This version, and the work that its data come from."""
    version = f"{manifest.id}, commit {manifest.provenance.code_commit[:12]}, trained with cellserve."
    return "\n".join(f"- {text}" for text in (version, *run.config.cite))


def _own_level(run: Run, level: str, classes: Sequence[str]) -> str:
    """Training cells of each class that the family made itself, and what those with a label are called."""
    classify = run.family.graphs()["classify"]
    output = classify.outputs.index(f"probabilities_{level}")
    cells = run.prepared.train.counts
    with torch.no_grad():
        found = torch.cat(
            [
                classify.module(torch.from_numpy(cells[i : i + _ROWS].toarray()))[output].argmax(dim=1)
                for i in range(0, cells.shape[0], _ROWS)
            ]
        ).numpy()
    rows = []
    for k, name in enumerate(classes):
        labels = run.prepared.train.labels[found == k][:, :1]
        labels = labels[labels >= 0]
        usual = ""
        if len(labels):
            most, n = max(enumerate(np.bincount(labels)), key=lambda item: item[1])
            usual = f"{tuple(run.config.labels[0].classes)[most]} ({n / len(labels):.0%})"
        rows.append((name, f"{int((found == k).sum()):,}", usual))
    return _table(("class", "training cells", "most frequent label"), rows)


def _intended_use(manifest: Manifest) -> str:
    uses = ["embedding", *(["reconstructing"] if "decode" in manifest.graphs else [])]
    uses += ["annotating"] if manifest.labels else []
    listed = " and ".join([", ".join(uses[:-1]), uses[-1]] if len(uses) > 1 else uses).capitalize()
    cells = "human cells" if manifest.genes.species == "homo_sapiens" else f"cells ({manifest.genes.species})"
    return f"{listed} {cells} of the kinds below, from raw counts."


def _limits(manifest: Manifest, run: Run) -> str:
    of_labels = _OF_UNKNOWN if manifest.unknown else _OF_LABELS
    limits = [*([of_labels] if manifest.labels else []), *run.config.limits, _NOT_MEDICAL]
    return "\n".join(f"- {limit}" for limit in limits)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
