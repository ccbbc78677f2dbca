"""How well annotate annotates: labels, confidence, prediction sets and unknown types, beside plain baselines, CellTypist and SCANVI.

    make bench-annotation
    python -m benchmarks.annotation pbmc_facs --seeds 1            one data set; the others stay in annotation.json as they are

For each seed cells are split and genes chosen anew, the same for all methods. Ours learns from the training cells and is calibrated on the
validation cells; the others learn from both. Nobody sees the test cells. Ours is exported, loaded and asked as the server asks it.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.cell_lines import ScviTools, log_normalise, summary
from benchmarks.machine import machine
from benchmarks.quality import show
from service.contract import artifact
from service.inference import model as serving
from service.inference.annotate import AnnotateOptions
from service.inference.annotate import run as annotate
from service.inference.model import Model
from service.inference.session import Runtime
from training import config as configuration
from training import export as exporting
from training import run as runs
from training.calibration import unknown
from training.calibration.calibrate import calibrate
from training.calibration.probabilities import reliability
from training.calibration.sets import COVERAGES
from training.config import Config
from training.data.prepared import add_labels
from training.data.reference import load_reference
from training.data.splits import TEST, TRAIN, VALIDATION
from training.run import Run

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "training/configs"
DATASETS: dict[str, tuple[Path, dict[str, Any]]] = {
    "pbmc_facs": (CONFIGS / "pbmc_levels.yaml", {"data": ["pbmc_facs"]}),
    "cell_lines": (CONFIGS / "cell_lines.yaml", {}),
}
"""Configuration and what of it is replaced."""

N_NEIGHBOURS, N_COMPONENTS = 15, 50
SUBTYPES = {"CD4 T", "CD8 T"}
"""Types that are mere subtypes of another that stays: left out of the second median."""

Array = NDArray[np.float64]


def configure(name: str, seed: int) -> Config:
    """The data set's configuration with a seed, and with those of its classes only that its cells have."""
    path, changes = DATASETS[name]
    config = configuration.load(path)
    document = config.model_dump(mode="json") | changes | {"seed": seed}
    found = Config.model_validate(document)
    cells = load_reference(found.data, found.cells, found.map_symbols, seed)
    add_labels(found, cells)
    lost: dict[str, set[str]] = {}
    for level in document["labels"]:
        present = set(cells.obs[level["name"]].astype(str))
        gone = {one for one in level["classes"] if one not in present}
        gone |= {one for one, parent in level["parents"].items() if parent in lost.get(level["parent"], set())}
        lost[level["name"]] = gone
        level["classes"] = {one: term for one, term in level["classes"].items() if one not in gone}
        level["parents"] = {one: parent for one, parent in level["parents"].items() if one not in gone}
        level["values"] = {own: one for own, one in level["values"].items() if one not in gone}
    return Config.model_validate(document)


@dataclasses.dataclass(frozen=True)
class Task:
    """Cells to learn from and cells to annotate."""

    reference: ad.AnnData
    query: ad.AnnData
    classes: tuple[str, ...]

    @property
    def truth(self) -> NDArray[np.int64]:
        """Class of each query cell."""
        return np.array([self.classes.index(label) for label in self.query.obs["label"]])

    def joined(self) -> ad.AnnData:
        """Both as the other side's scripts take them."""
        cells = ad.concat([self.reference, self.query])
        cells.obs["part"] = np.repeat(["reference", "query"], [self.reference.n_obs, self.query.n_obs])
        return cells


def make_task(run: Run, without: str | None = None) -> Task:
    """Labelled cells of a run over its genes; those of one class may be kept from the reference."""
    level = run.config.labels[0]
    labels = run.reference.obs[level.name].astype(str)
    is_labelled = labels.isin(level.classes).to_numpy()
    parts = []
    for names in ((TRAIN, VALIDATION), (TEST,)):
        positions = run.split.positions(run.reference, *names)
        positions = positions[is_labelled[positions]]
        if names != (TEST,):
            positions = positions[(labels.iloc[positions] != without).to_numpy()]
        cells = run.reference[positions, run.prepared.var.index]
        batch = cells.obs["batch"].astype(str).to_numpy()
        obs = {"batch": batch, "label": labels.iloc[positions].to_numpy()}
        made = ad.AnnData(sp.csr_matrix(cells.X, dtype=np.float32), obs=obs, var=cells.var[[]].copy())
        made.obs_names = cells.obs_names
        parts.append(made)
    return Task(parts[0], parts[1], tuple(level.classes))


def in_order(task: Task, probabilities: Array, classes: NDArray[Any]) -> Array:
    """Columns in the order of the task's classes; 0 for a class that a method does not know."""
    found = np.zeros((len(probabilities), len(task.classes)))
    for column, name in enumerate(classes):
        found[:, task.classes.index(str(name))] = probabilities[:, column]
    return found


def logistic_regression(task: Task) -> Array:
    """On ln(1 + counts per 10,000)."""
    model = LogisticRegression(max_iter=1000).fit(log_normalise(task.reference), task.reference.obs["label"])
    return in_order(task, model.predict_proba(log_normalise(task.query)), model.classes_)


def neighbours(task: Task) -> Array:
    """Shares of the nearest cells' labels in principal components."""
    known, asked = (log_normalise(cells).toarray() for cells in (task.reference, task.query))
    components = PCA(N_COMPONENTS, random_state=0).fit(known)
    model = KNeighborsClassifier(N_NEIGHBOURS).fit(components.transform(known), task.reference.obs["label"])
    return in_order(task, model.predict_proba(components.transform(asked)), model.classes_)


def celltypist(python: str) -> Callable[[Task], Array]:
    """CellTypist in an environment of its own."""

    def ask(task: Task) -> Array:
        with tempfile.TemporaryDirectory() as folder:
            path, made = Path(folder) / "cells.h5ad", Path(folder) / "answers.npz"
            task.joined().write_h5ad(path)
            script = str(Path(__file__).with_name("celltypist_side.py"))
            subprocess.run([python, script, str(path), str(made)], check=True, stdout=sys.stderr)
            with np.load(made) as arrays:
                return in_order(task, arrays["probabilities"], arrays["classes"])

    return ask


def scanvi(scvi: ScviTools) -> Callable[[Task], Array]:
    """SCANVI with the query mapped onto it."""

    def ask(task: Task) -> Array:
        found = scvi.ask(task.joined(), "soft")[0]
        return in_order(task, found["probabilities"], found["classes"])

    return ask


def figures(probabilities: Array, truth: NDArray[np.int64]) -> dict[str, float]:
    """Of labels and of confidence."""
    found = reliability(probabilities, truth)
    best = probabilities.argmax(axis=1)
    return {
        "accuracy": float((best == truth).mean()),
        "macro_f1": float(f1_score(truth, best, average="macro", labels=np.unique(truth), zero_division=0.0)),
        "expected_calibration_error": found.expected_calibration_error,
        "log_loss": found.log_loss,
    }


def prediction_sets(model: Model, task: Task) -> dict[str, float]:
    """Coverage and mean size on the query, at each asked coverage."""
    found = {}
    for asked in COVERAGES:
        columns = annotate(model, sp.csr_matrix(task.query.X), AnnotateOptions(coverage=asked))
        lists = columns["prediction_set"].lists()  # type: ignore[union-attr]
        is_in = [label in names for label, names in zip(task.query.obs["label"], lists, strict=True)]
        found[f"coverage at {asked:.0%}"] = float(np.mean(is_in))
        found[f"mean size at {asked:.0%}"] = float(np.mean([len(names) for names in lists]))
    return found


def unknown_types(run: Run, score: str, scvi: Callable[[Task], Array] | None) -> Iterator[tuple[str, dict[str, float]]]:
    """For each class the AUROC of telling its test cells from the others', by models that never met it."""
    level = run.config.labels[0]
    test = run.split.positions(run.reference, TEST)
    labels = run.reference.obs[level.name].astype(str).iloc[test]
    for name in level.classes:
        is_unknown = (labels == name).to_numpy()
        if is_unknown.sum() < 2:
            continue
        known = test[~is_unknown & labels.isin(level.classes).to_numpy()]
        trial = unknown.leave_out(run, name, known, test[is_unknown], 1.0)
        found = {"ours": unknown.aurocs(trial)[score]}
        if scvi is not None:
            task = make_task(run, without=name)
            found["SCANVI, 1 - max probability"] = float(
                roc_auc_score(task.query.obs["label"] == name, 1 - scvi(task).max(axis=1))
            )
        yield name, found


def measure(name: str, n_seeds: int, methods: dict[str, Callable[[Task], Array]]) -> dict[str, Any]:
    """Everything of a data set."""
    labels: dict[str, dict[str, list[float]]] = {}
    sets: dict[str, list[float]] = {}
    unseen: dict[str, dict[str, list[float]]] = {}
    chosen = []
    for seed in range(n_seeds):
        with tempfile.TemporaryDirectory() as folder:
            made = runs.fit(configure(name, seed), Path(folder) / "run", show_progress=False)
            made = dataclasses.replace(made, calibration=calibrate(made))
            model = serving.load(artifact.read(exporting.export(made, Path(folder) / "store")), Runtime())
        task = make_task(made)
        ours = annotate(model, sp.csr_matrix(task.query.X), AnnotateOptions())["probabilities"].values  # type: ignore[union-attr]
        answers = {"ours": ours.astype(np.float64)} | {method: ask(task) for method, ask in methods.items()}
        for method, probabilities in answers.items():
            for figure, value in figures(probabilities, task.truth).items():
                labels.setdefault(method, {}).setdefault(figure, []).append(value)
        for figure, value in prediction_sets(model, task).items():
            sets.setdefault(figure, []).append(value)
        assert model.manifest.unknown is not None, "both data sets have three classes and more"
        chosen.append(model.manifest.unknown.score)
        for left_out, found in unknown_types(made, model.manifest.unknown.score, methods.get("SCANVI")):
            for method, value in found.items():
                unseen.setdefault(left_out, {}).setdefault(method, []).append(value)
    return {
        "labels": {method: {one: summary(values) for one, values in found.items()} for method, found in labels.items()},
        "prediction_sets": {one: summary(values) for one, values in sets.items()},
        "unknown": {one: {m: summary(values) for m, values in found.items()} for one, found in unseen.items()},
        "unknown_median": {
            what: {
                method: summary(
                    [float(np.median([unseen[one][method][seed] for one in names])) for seed in range(n_seeds)]
                )
                for method in next(iter(unseen.values()))
            }
            for what, names in (
                ("all types", list(unseen)),
                ("no mere subtypes", [o for o in unseen if o not in SUBTYPES]),
            )
        },
        "mapping_score": chosen,
    }


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", choices=[*DATASETS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scvi-python", default=os.environ.get("CELLSERVE_BENCH_PYTHON"), help="without: no SCANVI")
    parser.add_argument(
        "--celltypist-python", default=os.environ.get("CELLSERVE_CELLTYPIST_PYTHON"), help="without: no CellTypist"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/scvi_quality", help="answers of scvi-tools, kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/annotation.json")
    options = parser.parse_args()
    methods: dict[str, Callable[[Task], Array]] = {"logistic regression": logistic_regression, "kNN on PCA": neighbours}
    if options.celltypist_python:
        methods["CellTypist"] = celltypist(options.celltypist_python)
    if options.scvi_python:
        methods["SCANVI"] = scanvi(ScviTools(options.scvi_python, options.cache, 1))
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.data or list(DATASETS):
        known[name] = {"machine": machine(), "n_seeds": options.seeds, **measure(name, options.seeds, methods)}
        options.output.write_text(json.dumps(known, indent=1) + "\n")
        show(name, known[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
