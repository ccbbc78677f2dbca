"""How well annotate annotates: labels, confidence, prediction sets and unknown types, beside plain baselines, CellTypist and SCANVI.

    make bench-annotation
    python -m benchmarks.annotation "pbmc3k, 80 to 20" --seeds 1    one setup; the others stay in annotation.json as they are
    python -m benchmarks.annotation --parts labels --methods cellserve    one method; what the others gave stays

For each seed cells are split and genes chosen anew, the same for all methods and whenever they are asked. All learn from the same cells;
ours is calibrated on them in folds, and another time learns from a part of them and is calibrated on the rest. Nobody sees the query.
Ours is exported, served, and asked over HTTP.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
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
from training.config import Genes
from training.data.features import BY_NAME
from training.data.splits import TRAIN, VALIDATION
from training.run import Run

ROOT = Path(__file__).parent.parent
N_NEIGHBOURS, N_COMPONENTS = 15, 50
N_FOLDS = 5
N_DRAWS = 1_000
"""Of labels, for the calibration error that perfect probabilities would show."""

SUBTYPES = {"CD4 T", "CD8 T"} | {
    f"{line} T" for line in ("CD4 naive", "CD4 memory", "CD4 helper", "CD4 regulatory", "CD8 naive", "CD8 cytotoxic")
}
"""Types that are mere subtypes of another that stays: left out of the second median."""

OURS, OURS_APART = "cellserve", "cellserve, validation cells"
REGRESSION, KNN, CELLTYPIST, SCANVI = "logistic regression", "kNN on PCA", "CellTypist", "SCANVI"
FOLDS = {OURS: N_FOLDS, OURS_APART: None}
"""In how many ours is calibrated; None: it learns from fewer cells than the others, and is calibrated on the rest of theirs."""

PARTS = ("labels", "sets", "unknown")
METHODS = (OURS, OURS_APART, REGRESSION, KNN, CELLTYPIST, SCANVI)

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


def ece_floor(probabilities: Array, seed: int) -> float:
    """Expected calibration error that these probabilities would show on so many cells if they were exactly right: the median over draws.

    Few cells never show none: in each bin the share that is right differs from its expectation by chance (Bröcker & Smith 2007,
    doi:10.1175/WAF993.1).
    """
    random, sums = np.random.default_rng(seed), np.cumsum(probabilities, axis=1)
    found = []
    for _ in range(N_DRAWS):
        # Of what is drawn below the last sum, which need not be 1 to the last bit.
        drawn = random.random(len(sums)) * sums[:, -1]
        labels = (sums <= drawn[:, None]).sum(axis=1)
        found.append(reliability(probabilities, labels).expected_calibration_error)
    return float(np.median(found))


def prediction_sets(client: Client, query: AnnData) -> dict[str, float]:
    """Coverage and mean size of the sets that are served, by what was asked."""
    found = {}
    for asked in COVERAGES:
        answer = client.run("annotate", query, coverage=asked)
        names = [str(joined).split("|") if joined else [] for joined in answer.obs["prediction_set"]]
        is_in = [label in these for label, these in zip(query.obs["label"], names, strict=True)]
        found[f"coverage at {asked:.0%}"] = float(np.mean(is_in))
        found[f"mean size at {asked:.0%}"] = float(np.mean([len(these) for these in names]))
    return found


@contextlib.contextmanager
def served(run: Run) -> Iterator[Client]:
    """A client of a server of the exported run."""
    with tempfile.TemporaryDirectory() as store:
        exporting.export(run, Path(store))
        with running_server(Path(store)) as url, Client(url) as client:
            yield client


def fit(material: Material, n_folds: int | None) -> Run:
    """Our side, on the cells and genes of the others: trained on all of them and calibrated in folds, or with None on validation cells."""
    config, var = material.config, material.reference.var.loc[material.genes]
    reference = config.export.reference.model_copy(update={"project": False})
    # Neither gene sets nor the picture: annotate needs none.
    changes = {
        "export": config.export.model_copy(update={"gene_sets": (), "reference": reference}),
        "split": config.split if n_folds is None else config.split.model_copy(update={"validation": 0.0}),
        "genes": Genes(rule=BY_NAME, names=tuple(var["gene_id"].where(var["gene_id"] != "", var["gene_symbol"]))),
    }
    with tempfile.TemporaryDirectory() as folder:
        run = runs.fit(config.model_copy(update=changes), Path(folder) / "run", show_progress=False)
    assert list(run.prepared.var.index) == list(material.genes), "the others have these genes"
    return dataclasses.replace(run, calibration=calibrate(run, finds_unknown=False, n_folds=n_folds))


def unknown_types(material: Material, method: Method | None, seed: int) -> tuple[str, dict[str, dict[str, float]]]:
    """The score that validation cells choose, and for each class its AUROC of telling the class's query cells from the others'.

    The networks never met the class and are those of `calibrate` without folds; its training and validation cells help to choose, its query
    cells do not.
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
    sets: Mapping[str, int]
    """Of prediction sets, by which of ours: the coverage of one seed may lie points off, more so where fewer cells calibrate it."""

    scanvi: int
    scanvi_unknown: int
    """With which it is trained without each type in turn, too."""


def measure_labels(name: str, seeds: Seeds, methods: dict[str, Method], ours: list[str]) -> dict[str, Any]:
    """Labels and confidence of a setup."""
    labels: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds.ours):
        material = prepared(SETUPS[name], seed)
        task = material.task()
        asked = {method: ask for method, ask in methods.items() if method != SCANVI or seed < seeds.scanvi}
        answers = {}
        for one in ours:
            with served(fit(material, FOLDS[one])) as client:
                known = client.annotate(task.query)
                answers[one] = known.obsm["probabilities"][list(task.classes)].to_numpy(np.float64)
        answers |= {method: ask(task, seed) for method, ask in asked.items()}
        for method, probabilities in answers.items():
            found = figures(probabilities, task.truth)
            if method == OURS:
                found["ece_floor"] = ece_floor(probabilities, seed)
            add(labels.setdefault(method, {}), found)
            print(f"{name}, seed {seed}, {method}: {found}", file=sys.stderr, flush=True)
    return {
        "cells": {"reference": task.reference.n_obs, "query": task.query.n_obs},
        "labels": {method: summaries(found) for method, found in labels.items()},
    }


def measure_sets(name: str, seeds: Seeds, ours: list[str]) -> dict[str, Any]:
    """Prediction sets of a setup."""
    sets: dict[str, dict[str, list[float]]] = {}
    for one in ours:
        for seed in range(seeds.sets[one]):
            material = prepared(SETUPS[name], seed)
            with served(fit(material, FOLDS[one])) as client:
                found = prediction_sets(client, material.task().query)
            add(sets.setdefault(one, {}), found)
            print(f"{name}, sets, seed {seed}, {one}: {found}", file=sys.stderr, flush=True)
    return {"prediction_sets": {one: summaries(found) for one, found in sets.items()}}


def add(lists: dict[str, list[float]], found: dict[str, float]) -> None:
    """Append the figures of one more seed."""
    for name, value in found.items():
        lists.setdefault(name, []).append(value)


def summaries(lists: dict[str, list[float]]) -> dict[str, Any]:
    """Each figure's median over seeds, with what it is of."""
    return {name: summary(values) for name, values in lists.items()}


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


def warm(name: str, parts: Sequence[str], seeds: Seeds, ask: Method) -> None:
    """Let SCANVI answer everything that those parts will ask it."""
    for seed in range(seeds.scanvi):
        material = prepared(SETUPS[name], seed)
        left_out = material.config.labels[0].classes if "unknown" in parts and seed < seeds.scanvi_unknown else ()
        for without in (*([None] if "labels" in parts else []), *left_out):
            ask(material.task(without), seed)


def merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What is known with what was found now: figures that were not asked for, of other methods for example, stay."""
    inside = {
        name: merged(before[name], value)
        for name, value in found.items()
        if isinstance(value, dict) and name in before and "median" not in value
    }
    return before | found | inside


def where(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By part, and by method or kind of it, the machine and the day."""
    unknown_of = found["unknown"]["over_types"]["all types"] if "unknown" in found else {}
    parts = {"labels": found.get("labels"), "prediction_sets": found.get("prediction_sets"), "unknown": unknown_of}
    return {part: dict.fromkeys(names, here()) for part, names in parts.items() if names}


def here() -> dict[str, str | int]:
    """The machine, and the day."""
    return machine() | {"date": datetime.now(UTC).date().isoformat()}


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setups", nargs="*", choices=[*SETUPS, []], help="default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="unknown asks ours always; default: all",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set-seeds", type=int, default=30, help="of prediction sets calibrated on validation cells")
    parser.add_argument("--fold-set-seeds", type=int, default=10, help="of those calibrated in folds")
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
    methods: dict[str, Method] = {REGRESSION: logistic_regression, KNN: neighbours}
    if options.celltypist_python:
        methods[CELLTYPIST] = celltypist(options.celltypist_python)
    if options.scvi_python:
        methods[SCANVI] = scanvi(ScviTools(options.scvi_python, options.cache, options.seeds))
    asked = {method: ask for method, ask in methods.items() if method in options.methods}
    n_scanvi = options.seeds if options.scanvi_seeds is None else options.scanvi_seeds
    n_unknown = n_scanvi if options.scanvi_unknown_seeds is None else options.scanvi_unknown_seeds
    sets = {OURS: options.fold_set_seeds, OURS_APART: options.set_seeds}
    seeds = Seeds(options.seeds, sets, n_scanvi, n_unknown)
    ours = [one for one in FOLDS if one in options.methods]
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.setups or list(SETUPS):
        parts = [part for part in options.parts if part in SETUPS[name].parts]
        if options.scanvi_only:
            warm(name, parts, seeds, methods[SCANVI])
            continue
        found = measure_labels(name, seeds, asked, ours) if "labels" in parts else {}
        if "sets" in parts:
            found |= measure_sets(name, seeds, ours)
        if "unknown" in parts:
            found |= measure_unknown(name, seeds, asked)
        known[name] = merged(known.get(name, {}), found | {"machine": where(found)})
        options.output.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        show(name, known[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
