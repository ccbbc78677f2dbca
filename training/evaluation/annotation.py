"""How well a run annotates, beside logistic regression on the same cells and genes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, make_scorer
from sklearn.model_selection import KFold, cross_val_score

from service.contract import artifact
from service.inference import model as serving
from service.inference.model import Model
from service.inference.session import Runtime
from training import fit as fitting
from training.config import Config
from training.data.prepared import Prepared, encode_cells, prepare
from training.data.splits import PUBLISHED, TEST, TRAIN, Split
from training.families.family import Family
from training.manifest import build
from training.run import Run

C_GRID = (0.001, 0.01, 0.1, 1.0)
REGRESSIONS: dict[str, tuple[tuple[float, ...], str | None]] = {
    "logistic_regression": ((1.0,), None),
    "logistic_regression_tuned": (C_GRID, None),
    "logistic_regression_balanced": (C_GRID, "balanced"),
}
"""What ours is compared with: values of C to choose from, and class weights."""

_FOLDS = KFold(5, shuffle=True, random_state=0)  # not stratified: a class may have fewer cells than there are folds
_MACRO_F1 = make_scorer(f1_score, average="macro", zero_division=0.0)

Labels = NDArray[np.int64]
Predict = Callable[[sp.csr_matrix], Labels]
"""Raw counts over the model's genes to classes, as numbers."""


def score_within(run: Run, model: Model) -> dict[str, float]:
    """Accuracy and macro-F1 of a served model on cells that it was not trained on; empty for a run without labels."""
    if not is_annotating(run):
        return {}
    figures = {}
    for name, positions in query_sets(run).items():
        found = score(run.config, run.reference[positions], run.prepared, served(model))
        figures |= {f"{metric}_{name}": value for metric, value in found.items()}
    return figures


def query_sets(run: Run) -> dict[str, NDArray[np.int64]]:
    """Positions of held-out cells with a label of the first level, by name: those of each set, and those that were published apart."""
    held_out = run.split.positions(run.reference, TEST)
    dataset = run.reference.obs["dataset"].to_numpy()
    sets = {f"held_out_{name}": held_out[dataset[held_out] == name] for name in run.config.datasets}
    sets["published_test"] = run.split.positions(run.reference, PUBLISHED)
    level = run.config.labels[0]
    is_labelled = run.reference.obs[level.name].astype(str).isin(set(level.classes)).to_numpy()
    sets = {name: positions[is_labelled[positions]] for name, positions in sets.items()}
    return {name: positions for name, positions in sets.items() if len(positions)}


def is_annotating(run: Run) -> bool:
    """Whether the run classifies by labels of its data; a mixture without labels classifies too, by clusters of its own."""
    return bool(run.config.labels) and "classify" in run.family.graphs()


def compare_methods(run: Run, is_across: bool = True, show: Callable[[str], object] = str) -> list[dict[str, object]]:
    """Score the run, and the same configuration across sets, beside logistic regression.

    Args:
        run: a finished run.
        is_across: train on each data set alone too, and annotate the others with what comes of it.
        show: told what is being done.

    Returns:
        One row per query: name, number of cells, and accuracy and macro-F1 of ours and of each of REGRESSIONS. Empty for a run without a
        classifier.
    """
    if not is_annotating(run):
        return []
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        manifest, contents = build(run, "evaluated", for_serving=False)
        model = serving.load(artifact.read(artifact.write(Path(scratch), manifest, contents)), Runtime())
    show("annotation within sets")
    methods = {"ours": served(model), **regressions(run.prepared)}
    for name, positions in query_sets(run).items():
        rows.append(_row(run.config, name, run.reference[positions], run.prepared, methods))
    for source in run.config.datasets if is_across and len(run.config.datasets) > 1 else ():
        show(f"annotation trained on {source} only")
        rows += _across(run, source)
    return rows


def annotate(run: Run, family: Family) -> dict[str, dict[str, float]]:
    """Accuracy and macro-F1 of any model of the run through torch, by query; empty without a classifier."""
    if not is_annotating(run):
        return {}
    queries = query_sets(run).items()
    return {name: score(run.config, run.reference[rows], run.prepared, trained(family)) for name, rows in queries}


def _across(run: Run, source: str) -> list[dict[str, object]]:
    """Train on one set, annotate the others; cells whose type the source lacks are left out."""
    one = tuple(data for data, name in zip(run.config.data, run.config.datasets, strict=True) if name == source)
    config = run.config.model_copy(update={"data": one})
    dataset = run.reference.obs["dataset"]
    cells = run.reference[(dataset == source).to_numpy()].copy()
    # Nothing of the source needs to be held out but what decides when to stop.
    part = {name: TRAIN if run.split.part[name] == TEST else run.split.part[name] for name in cells.obs_names}
    prepared = prepare(config, cells, Split(part))
    with tempfile.TemporaryDirectory() as scratch:
        fitted = fitting.fit(config, prepared, Path(scratch), show_progress=False)
    level = config.labels[0].name
    known = set(cells.obs[level].astype(str)) & set(config.labels[0].classes)
    methods = {"ours": trained(fitted.family), **regressions(prepared)}
    rows = []
    for target in run.config.datasets:
        if target != source:
            chosen = (dataset == target) & run.reference.obs[level].astype(str).isin(known)
            rows.append(_row(config, f"{source} → {target}", run.reference[chosen.to_numpy()], prepared, methods))
    return rows


def _row(
    config: Config, name: str, cells: AnnData, prepared: Prepared, methods: dict[str, Predict]
) -> dict[str, object]:
    scores = {method: score(config, cells, prepared, predict) for method, predict in methods.items()}
    return {"query": name, "n_cells": cells.n_obs, **scores}


def score(config: Config, cells: AnnData, prepared: Prepared, predict: Predict) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that the cells have, on the first label level."""
    genes = cells.var_names.get_indexer(prepared.var.index)
    query = encode_cells(config, cells, genes)
    truth, found = query.labels[:, 0], predict(query.counts)
    macro_f1 = f1_score(truth, found, average="macro", labels=np.unique(truth), zero_division=0.0)
    return {"accuracy": float(accuracy_score(truth, found)), "macro_f1": float(macro_f1)}


def served(model: Model) -> Predict:
    """Predictions of the first label level through the runtime that serves."""

    def predict(counts: sp.csr_matrix) -> Labels:
        return next(iter(model.classify(counts).values())).argmax(axis=1)

    return predict


def trained(family: Family) -> Predict:
    """Predictions of the first label level through torch."""
    graphs = family.eval().graphs()

    def predict(counts: sp.csr_matrix) -> Labels:
        known = {"counts": torch.from_numpy(counts.toarray())}
        with torch.no_grad():
            known["latent"] = graphs["encode"].module(known["counts"])
            classify = graphs["classify"]
            return classify.module(*(known[name] for name in classify.inputs))[0].argmax(dim=1).numpy()

    return predict


def regressions(prepared: Prepared) -> dict[str, Predict]:
    """Logistic regression on ln(1 + counts per 10,000), by name: a row of REGRESSIONS each.

    Where there is a choice of C it is made by macro-F1 on the validation cells, and without them by that of five folds of the training cells.
    """
    train, validation = prepared.train, prepared.validation
    known, checked = train.labels[:, 0] >= 0, validation.labels[:, 0] >= 0
    features, labels = log_normalise(train.counts[known]), train.labels[known, 0]
    held_out, truth = log_normalise(validation.counts[checked]), validation.labels[checked, 0]

    def quality(model: LogisticRegression) -> float:
        if not len(truth):
            return float(cross_val_score(clone(model), features, labels, cv=_FOLDS, scoring=_MACRO_F1).mean())
        return f1_score(truth, model.predict(held_out), average="macro", zero_division=0.0)

    chosen = {}
    for name, (grid, class_weight) in REGRESSIONS.items():
        models = [LogisticRegression(C=c, class_weight=class_weight, max_iter=1000).fit(features, labels) for c in grid]
        chosen[name] = max(models, key=quality) if len(models) > 1 else models[0]
    return {name: (lambda counts, model=model: model.predict(log_normalise(counts))) for name, model in chosen.items()}


def log_normalise(counts: sp.csr_matrix) -> sp.csr_matrix:
    """ln(1 + counts per 10,000 over the model's genes), as the encoders see them."""
    library = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    return sp.csr_matrix(sp.diags(1e4 / library) @ counts).log1p()
