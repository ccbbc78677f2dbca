"""How well annotate annotates: labels, confidence, prediction sets and unknown types, beside plain baselines, CellTypist and SCANVI.

    make bench-annotation
    python -m benchmarks.annotation "pbmc3k, 80 to 20" --seeds 1    one setup; the others stay in annotation.json as they are

For each seed cells are split and genes chosen anew, the same for all methods. Ours learns from the training cells and is calibrated on the
validation cells; the others learn from both. Nobody sees the query. Ours is exported, served, and asked over HTTP.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.annotation_tasks import SETUPS, Material, Task, prepared
from benchmarks.cell_lines import ScviTools, log_normalise, summary
from benchmarks.machine import machine
from benchmarks.quality import show
from service.client import Client
from tests.end_to_end.server import running_server
from training import export as exporting
from training import run as runs
from training.calibration import unknown
from training.calibration.calibrate import SHARE_OF_EPOCHS, calibrate
from training.calibration.probabilities import reliability
from training.calibration.sets import COVERAGES
from training.data.splits import TRAIN, VALIDATION
from training.run import Run

ROOT = Path(__file__).parent.parent
N_NEIGHBOURS, N_COMPONENTS = 15, 50
SUBTYPES = {"CD4 T", "CD8 T"} | {
    f"{line} T" for line in ("CD4 naive", "CD4 memory", "CD4 helper", "CD4 regulatory", "CD8 naive", "CD8 cytotoxic")
}
"""Types that are mere subtypes of another that stays: left out of the second median."""

OURS, SCANVI = "cellserve", "SCANVI"

Array = NDArray[np.float64]
Method = Callable[[Task, int], Array]
"""Probabilities (n_query, n_classes) of a task and a seed."""


def in_order(task: Task, probabilities: Array, classes: NDArray[Any]) -> Array:
    """Columns in the order of the task's classes; 0 for a class that a method does not know."""
    found = np.zeros((len(probabilities), len(task.classes)))
    for column, name in enumerate(classes):
        found[:, task.classes.index(str(name))] = probabilities[:, column]
    return found


def logistic_regression(task: Task, _seed: int) -> Array:
    """On ln(1 + counts per 10,000)."""
    model = LogisticRegression(max_iter=1000).fit(log_normalise(task.reference), task.reference.obs["label"])
    return in_order(task, model.predict_proba(log_normalise(task.query)), model.classes_)


def neighbours(task: Task, seed: int) -> Array:
    """Shares of the nearest cells' labels in principal components."""
    known, asked = (log_normalise(cells).toarray() for cells in (task.reference, task.query))
    components = PCA(N_COMPONENTS, random_state=seed).fit(known)
    model = KNeighborsClassifier(N_NEIGHBOURS).fit(components.transform(known), task.reference.obs["label"])
    return in_order(task, model.predict_proba(components.transform(asked)), model.classes_)


def celltypist(python: str) -> Method:
    """CellTypist in an environment of its own."""

    def ask(task: Task, _seed: int) -> Array:
        with tempfile.TemporaryDirectory() as folder:
            path, made = Path(folder) / "cells.h5ad", Path(folder) / "answers.npz"
            task.joined().write_h5ad(path)
            script = str(Path(__file__).with_name("celltypist_side.py"))
            subprocess.run([python, script, "annotate", str(path), str(made)], check=True, stdout=sys.stderr)
            with np.load(made) as arrays:
                return in_order(task, arrays["probabilities"], arrays["classes"])

    return ask


def scanvi(scvi: ScviTools) -> Method:
    """SCANVI, with the query mapped onto it where it is of another batch."""

    def ask(task: Task, seed: int) -> Array:
        found = scvi.ask_one(task.joined(), "soft", seed)
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


@contextlib.contextmanager
def served(run: Run) -> Iterator[Client]:
    """A client of a server of the exported run."""
    with tempfile.TemporaryDirectory() as store:
        exporting.export(run, Path(store))
        with running_server(Path(store)) as url, Client(url) as client:
            yield client


def fit(material: Material) -> Run:
    """Our side, trained and calibrated."""
    config = material.config
    reference = config.export.reference.model_copy(update={"project": False})
    lean = config.export.model_copy(update={"gene_sets": (), "reference": reference})  # what annotate does not need
    with tempfile.TemporaryDirectory() as folder:
        run = runs.fit(config.model_copy(update={"export": lean}), Path(folder) / "run", show_progress=False)
    assert list(run.prepared.var.index) == list(material.genes), "the others have these genes"
    return dataclasses.replace(run, calibration=calibrate(run, finds_unknown=False))


def unknown_types(material: Material, method: Method | None, seed: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The score that validation cells choose, and for each class its AUROC of telling the class's query cells from the others'.

    The networks never met the class and are those of `calibrate`; its training and validation cells help to choose, its query cells do not.
    """
    config, reference, split = material.config, material.reference, material.split
    level = config.labels[0]
    labels = reference.obs[level.name].astype(str)
    query, validation, seen = (
        split.positions(reference, *parts) for parts in ((material.setup.query,), (VALIDATION,), (TRAIN, VALIDATION))
    )
    chosen_by, asked = {}, {}
    answers: dict[str, dict[str, float]] = {}
    for name in level.classes:
        is_class = (labels == name).to_numpy()
        is_other = labels.isin(level.classes).to_numpy() & ~is_class
        known = [validation[is_other[validation]], query[is_other[query]]]
        left_out = [seen[is_class[seen]], query[is_class[query]]]
        if min(map(len, left_out)) < unknown.MIN_CELLS:
            continue
        trial = unknown.leave_out(
            config, reference, split, name, np.concatenate(known), np.concatenate(left_out), SHARE_OF_EPOCHS
        )
        n_known, n_unknown = len(known[0]), len(left_out[0])
        chosen_by[name], asked[name] = (
            unknown.aurocs(
                unknown.Trial(
                    name,
                    {score: values[of_known] for score, values in trial.known.items()},
                    {score: values[of_unknown] for score, values in trial.unknown.items()},
                )
            )
            for of_known, of_unknown in (
                (slice(n_known), slice(n_unknown)),
                (slice(n_known, None), slice(n_unknown, None)),
            )
        )
        answers[name] = {}
        if method is not None:
            task = material.task(without=name)
            confidence = method(task, seed).max(axis=1)
            answers[name]["SCANVI, 1 - max probability"] = float(roc_auc_score(task.truth < 0, 1 - confidence))
    mean = unknown.means(chosen_by)
    score = max(mean, key=lambda name: mean[name])
    return score, {name: {OURS: asked[name][score], **found} for name, found in answers.items()}


def medians(unseen: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """AUROC by type, and its median over types; over seeds each. A method that was asked with fewer seeds has fewer."""
    methods = dict.fromkeys(method for found in unseen for one in found.values() for method in one)
    types = {
        name: {
            method: summary([found[name][method] for found in unseen if method in found[name]]) for method in methods
        }
        for name in unseen[0]
    }
    groups = {"all types": list(types), "no mere subtypes": [name for name in types if name not in SUBTYPES]}
    over = {
        group: {
            method: summary(
                [
                    float(np.median([found[one][method] for one in names]))
                    for found in unseen
                    if method in found[names[0]]
                ]
            )
            for method in methods
        }
        for group, names in groups.items()
    }
    return {"types": types, "over_types": over}


@dataclasses.dataclass(frozen=True)
class Seeds:
    """How many seeds; SCANVI, which trains for minutes, may have fewer."""

    ours: int
    sets: int
    """Of prediction sets, whose coverage of a few hundred cells is uncertain by two points."""
    scanvi: int
    scanvi_unknown: int
    """With which it is trained without each type in turn, too."""

    def of(self, part: str) -> dict[str, int]:
        """Of one of PARTS."""
        return {
            "labels": {"ours": self.ours, "scanvi": self.scanvi},
            "sets": {"ours": self.sets},
            "unknown": {"ours": self.ours, "scanvi": self.scanvi_unknown},
        }[part]


def measure_labels(name: str, seeds: Seeds, methods: dict[str, Method]) -> dict[str, Any]:
    """Labels and confidence of a setup."""
    labels: dict[str, dict[str, list[float]]] = {}
    sizes = []
    for seed in range(seeds.ours):
        material = prepared(SETUPS[name], seed)
        task = material.task()
        with served(fit(material)) as client:
            probabilities = client.annotate(task.query).obsm["probabilities"][list(task.classes)].to_numpy(np.float64)
        asked = {method: ask for method, ask in methods.items() if method != SCANVI or seed < seeds.scanvi}
        answers = {OURS: probabilities} | {method: ask(task, seed) for method, ask in asked.items()}
        for method, found in answers.items():
            for figure, value in figures(found, task.truth).items():
                labels.setdefault(method, {}).setdefault(figure, []).append(value)
        sizes.append({"reference": task.reference.n_obs, "query": task.query.n_obs})
        print(f"{name}, seed {seed}: {figures(probabilities, task.truth)}", file=sys.stderr, flush=True)
    return {
        "cells": sizes[0],
        "labels": {method: {one: summary(values) for one, values in found.items()} for method, found in labels.items()},
    }


def measure_sets(name: str, seeds: Seeds, _methods: dict[str, Method]) -> dict[str, Any]:
    """Coverage and mean size of a setup's prediction sets."""
    sets: dict[str, list[float]] = {}
    for seed in range(seeds.sets):
        material = prepared(SETUPS[name], seed)
        query = material.task().query
        with served(fit(material)) as client:
            for asked in COVERAGES:
                answer = client.run("annotate", query, coverage=asked)
                names = [str(joined).split("|") if joined else [] for joined in answer.obs["prediction_set"]]
                is_in = [label in found for label, found in zip(query.obs["label"], names, strict=True)]
                sets.setdefault(f"coverage at {asked:.0%}", []).append(float(np.mean(is_in)))
                sets.setdefault(f"mean size at {asked:.0%}", []).append(float(np.mean([len(found) for found in names])))
        print(
            f"{name}, seed {seed}: { ({one: values[-1] for one, values in sets.items()}) }", file=sys.stderr, flush=True
        )
    return {"prediction_sets": {one: summary(values) for one, values in sets.items()}}


def measure_unknown(name: str, seeds: Seeds, methods: dict[str, Method]) -> dict[str, Any]:
    """Types of a setup left out in turn."""
    unseen, chosen = [], []
    for seed in range(seeds.ours):
        asked = methods.get(SCANVI) if seed < seeds.scanvi_unknown else None
        score, found = unknown_types(prepared(SETUPS[name], seed), asked, seed)
        chosen.append(score)
        unseen.append(found)
        print(f"{name}, seed {seed}: {score} {found}", file=sys.stderr, flush=True)
    return {"unknown": medians(unseen), "mapping_score": chosen}


PARTS = {"labels": measure_labels, "sets": measure_sets, "unknown": measure_unknown}


def warm(name: str, parts: Sequence[str], seeds: Seeds, ask: Method) -> None:
    """Let SCANVI answer everything that those parts will ask it."""
    for seed in range(seeds.scanvi):
        material = prepared(SETUPS[name], seed)
        left_out = material.config.labels[0].classes if "unknown" in parts and seed < seeds.scanvi_unknown else ()
        for without in (*([None] if "labels" in parts else []), *left_out):
            ask(material.task(without), seed)


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setups", nargs="*", choices=[*SETUPS, []], help="default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set-seeds", type=int, default=10, help="of prediction sets")
    parser.add_argument("--scanvi-seeds", type=int, help="default: as many")
    parser.add_argument(
        "--scanvi-unknown-seeds", type=int, help="with which SCANVI is trained without each type, too; default: as many"
    )
    parser.add_argument("--scvi-python", default=os.environ.get("CELLSERVE_BENCH_PYTHON"), help="without: no SCANVI")
    parser.add_argument(
        "--celltypist-python", default=os.environ.get("CELLSERVE_CELLTYPIST_PYTHON"), help="without: no CellTypist"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/scvi_quality", help="answers of scvi-tools, kept")
    parser.add_argument("--scanvi-only", action="store_true", help="only fill that cache, which takes longest")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/annotation.json")
    options = parser.parse_args()
    methods: dict[str, Method] = {"logistic regression": logistic_regression, "kNN on PCA": neighbours}
    if options.celltypist_python:
        methods["CellTypist"] = celltypist(options.celltypist_python)
    if options.scvi_python:
        methods[SCANVI] = scanvi(ScviTools(options.scvi_python, options.cache, options.seeds))
    n_scanvi = options.seeds if options.scanvi_seeds is None else options.scanvi_seeds
    n_unknown = n_scanvi if options.scanvi_unknown_seeds is None else options.scanvi_unknown_seeds
    seeds = Seeds(options.seeds, options.set_seeds, n_scanvi, n_unknown)
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.setups or list(SETUPS):
        parts = [part for part in options.parts if part in SETUPS[name].parts]
        if options.scanvi_only:
            warm(name, parts, seeds, methods[SCANVI])
            continue
        found = [PARTS[part](name, seeds, methods) for part in parts]
        before = known.get(name, {})
        known[name] = before | {key: value for one in found for key, value in one.items()}
        known[name]["machine"] = before.get("machine", {}) | dict.fromkeys(parts, machine())
        known[name]["n_seeds"] = before.get("n_seeds", {}) | {part: seeds.of(part) for part in parts}
        options.output.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        show(name, known[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
