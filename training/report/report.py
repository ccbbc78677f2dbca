"""The report of a run: its curves, latent, reconstructions, answers and clusters, and how it was made."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.report import curves, plots, projections
from training.report.drawing import Image
from training.report.measures import Agreement, Annotation, Reconstruction, agreements, annotation, reconstruction
from training.report.page import Section, code, image, note, page, table
from training.report.sample import Sample, draw_all, draw_unseen
from training.run import Run

REPORT, PLOTS = "report.html", "plots"
N_CELLS = 2000
"""Cells at most that a latent is shown for, and at most that are measured; UMAP and t-SNE take seconds for as many."""

_SEED = 0


@dataclass(frozen=True)
class Report:
    """A page, its plots, and the figures that it gives."""

    html: str
    images: tuple[Image, ...]
    reconstruction: Reconstruction
    annotations: tuple[Annotation, ...]
    agreements: tuple[Agreement, ...]


def make(run: Run, directory: Path, n_cells: int = N_CELLS) -> Report:
    """Compute everything; the same bytes for the same run and packages.

    Args:
        run: a finished one.
        directory: of the run.
        n_cells: drawn at most, for the plots of the latent and again for all figures.
    """
    with projections.one_thread():
        shown, unseen = draw_all(run, n_cells, _SEED), draw_unseen(run, n_cells, _SEED)
        rebuilt = reconstruction(unseen)
        levels = {level.name: tuple(level.classes) for level in run.config.labels}
        answered = {
            name: annotation(unseen.labels[name], unseen.probabilities[name], name, classes)
            for name, classes in levels.items()
            if name in unseen.probabilities
        }
        agreed = [row for level in levels for row in agreements(unseen, level, _SEED)]
    annotations = tuple(found for found in answered.values() if found is not None)
    images: list[Image] = []
    sections = (
        _overview(run, unseen, rebuilt, annotations),
        _losses(run, directory, images),
        _latent(run, shown, images),
        _reconstruction(unseen, rebuilt, images),
        _annotation(run, unseen, answered, images),
        _clusters(run, unseen, agreed),
        _making(run),
    )
    config = run.config
    about = [config.summary, f"{config.family}, trained on {', '.join(config.datasets)}."]
    html = page(f"Report of {config.name}", " · ".join(part for part in about if part), sections)
    return Report(html, tuple(images), rebuilt, annotations, tuple(agreed))


def write(report: Report, path: Path, plots_folder: Path | None = None) -> None:
    """Write the page and, where asked for, each plot as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.html)
    if plots_folder is not None:
        plots_folder.mkdir(parents=True, exist_ok=True)
        for picture in report.images:
            (plots_folder / f"{picture.name}.{picture.kind}").write_bytes(picture.data)


def _overview(run: Run, unseen: Sample, rebuilt: Reconstruction, annotations: tuple[Annotation, ...]) -> Section:
    found = run.provenance
    rows: list[tuple[str, str | int | float]] = [("epoch that was kept", f"the last, {found['n_epochs']}")]
    if found["best_validation_loss"] is not None:
        rows = [
            ("best epoch", f"{found['best_epoch'] + 1} of {found['n_epochs']}"),
            ("validation loss of that epoch", float(found["best_validation_loss"])),
        ]
    rows += [
        ("seconds to train", float(found["seconds"])),
        ("parameters", sum(weight.numel() for weight in run.family.parameters())),
        ("genes", len(run.prepared.var)),
        ("latent dimensions", unseen.latent.shape[1]),
        ("technical batches", len(run.prepared.batches)),
        ("training cells", len(run.prepared.train)),
        ("validation cells", len(run.prepared.validation)),
        ("r of mean counts per gene", rebuilt.gene_correlation),
    ]
    for one in annotations:
        rows.append((f"accuracy, {one.level}", one.accuracy))
        rows.append((f"expected calibration error, {one.level}", one.expected_calibration_error))
    stopped = (note("Training was interrupted before it was done."),) if found["is_interrupted"] else ()
    return Section("Overview", (table(("what", "value"), rows), *stopped))


def _losses(run: Run, directory: Path, images: list[Image]) -> Section:
    found = curves.read(directory)
    if found is None or not found.values:
        return Section("Losses", (note("metrics.csv of this run is missing or empty, so there are no curves."),))
    images.append(curves.plot(found, run.provenance["best_epoch"] + 1))
    best = found.epoch == run.provenance["best_epoch"] + 1
    rows = []
    for name, parts in found.values.items():
        values = [parts[part][best] if part in parts else () for part in ("train", "validation")]
        rows.append((name, *(float(value[0]) if len(value) else "absent" for value in values)))
    n_lost = sum(int((~np.isfinite(values)).sum()) for parts in found.values.values() for values in parts.values())
    lost = (note(f"{n_lost} values in metrics.csv are not numbers and are left out of the curves."),) if n_lost else ()
    kept = "at the last epoch" if run.provenance["best_validation_loss"] is None else "at the best epoch"
    return Section("Losses", (image(images[-1]), table((kept, "train", "validation"), rows), *lost))


def _latent(run: Run, shown: Sample, images: list[Image]) -> Section:
    try:
        planes = projections.project(shown.latent)
    except projections.TooFewCells as problem:
        return Section("Latent", (note(str(problem)),))
    parts = [note(f"{shown.says}, drawn with seed {_SEED}; the projections have seed {projections.SEED}.")]
    for level in run.config.labels:
        names = shown.labels[level.name]
        if not (names != "").any():
            parts.append(note(f"No cell has a label of {level.name}, so there is no plot by it."))
            continue
        file = f"latent_by_level_{_file_name(level.name, len(images))}"
        images.append(plots.latent(planes, names, [c for c in level.classes if c in set(names)], level.name, file))
        parts.append(image(images[-1], f"By {level.name}"))
    if not run.config.labels:
        parts.append(note("The configuration names no labels, so there is no plot by type."))
    batches = sorted(set(shown.batch))
    file, key = "latent_by_batch", run.config.batch_key
    images.append(plots.latent(planes, shown.batch, batches, "batch", file))
    by = key if isinstance(key, str) else ", ".join(key)
    one = f" (there is one: {batches[0]})" if len(batches) == 1 else ""
    parts.append(image(images[-1], f"By technical batch, {by}{one}"))
    for name, values in shown.probabilities.items():
        if name not in shown.labels:
            clusters = values.argmax(axis=1).astype(str).astype(object)
            file = f"latent_by_clusters_{_file_name(name, len(images))}"
            order = sorted(set(clusters), key=int)
            images.append(plots.latent(planes, clusters, order, f"the model's clusters ({name})", file))
            parts.append(image(images[-1], f"By the model's clusters ({name})"))
    return Section("Latent", tuple(parts))


def _reconstruction(unseen: Sample, found: Reconstruction, images: list[Image]) -> Section:
    images.append(plots.reconstruction(found))
    rows = [
        ("r of ln(1 + mean counts) over genes", found.gene_correlation),
        ("r of ln(1 + counts) over cells", found.cell_correlation),
        ("median over cells of r of ln(1 + counts) over genes", found.within_cell),
        ("mean counts per cell, observed", float(found.observed_cell.mean())),
        ("mean counts per cell, reconstructed", float(found.predicted_cell.mean())),
    ]
    said = note(
        f"{unseen.says}, drawn with seed {_SEED}. A decoder that is told the counts of a cell gives their sum back by itself, so the right "
        "plot says something of decoders that are not."
    )
    return Section("Reconstruction", (said, image(images[-1]), table(("what", "value"), rows)))


def _annotation(run: Run, unseen: Sample, answered: dict[str, Annotation | None], images: list[Image]) -> Section:
    if not run.config.labels:
        return Section("Annotation", (note("The configuration names no labels, so there is nothing to annotate."),))
    parts = []
    for level in run.config.labels:
        found = answered.get(level.name)
        if level.name not in answered:
            parts.append(note(f"The model does not classify {level.name}."))
        elif found is None:
            parts.append(note(f"None of the {unseen.says} has a label of {level.name}."))
        else:
            name = _file_name(level.name, len(images))
            images.append(plots.confusion(found, f"confusion_{name}"))
            images.append(plots.reliability(found, f"reliability_{name}"))
            rows = [
                ("cells with a label", found.n_cells),
                ("accuracy", found.accuracy),
                ("macro-F1", found.macro_f1),
                ("expected calibration error", found.expected_calibration_error),
            ]
            parts += [note(f"{level.name}: {unseen.says}, drawn with seed {_SEED}."), table(("what", "value"), rows)]
            parts += [
                image(images[-2], f"Confusion of {level.name}"),
                image(images[-1], f"Calibration of {level.name}"),
            ]
    return Section("Annotation", tuple(parts))


def _clusters(run: Run, unseen: Sample, rows: list[Agreement]) -> Section:
    if not rows:
        why = "the configuration names no labels" if not run.config.labels else "the cells have fewer than two classes"
        return Section("Clusters", (note(f"There is no agreement of clusters with labels to give: {why}."),))
    said = note(f"{unseen.says}; as many clusters as the cells have classes, seed {_SEED}.")
    lines = [(r.level, r.method, r.n_cells, r.n_clusters, r.ari, r.ami, r.nmi) for r in rows]
    return Section("Clusters", (said, table(("labels", "clusters", "cells", "number", "ARI", "AMI", "NMI"), lines)))


def _making(run: Run) -> Section:
    found = run.provenance
    environment = [
        ("made", found["created"]),
        ("code", found["code_commit"]),
        *((f"hardware: {name}", str(value)) for name, value in found["hardware"].items()),
        *((f"package: {name}", value) for name, value in found["packages"].items()),
    ]
    config = run.config
    seeds = [
        ("split, weights, order of cells, noise", config.seed),
        ("cells and plots of this page", _SEED),
    ]
    digests = [(name, file, digest) for name, files in found["data"].items() for file, digest in files.items()]
    deterministic = "on" if config.fit.deterministic else "off"
    return Section(
        "How it was made",
        (
            code(found["command"]),
            note(
                f"Deterministic algorithms are {deterministic}; {config.fit.n_threads} CPU threads, {config.fit.precision}."
            ),
            table(("seed of", "value"), seeds),
            table(("environment", "value"), environment),
            table(("data set", "file", "sha256"), digests),
            code(config.dump()),
        ),
    )


def _file_name(name: str, number: int) -> str:
    """A level's name as a part of a file name; the number keeps two names apart that differ in other letters only."""
    plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    return plain if plain == name else f"{plain}_{number}"
