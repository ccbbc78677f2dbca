"""Whether explanations explain: sums that add up, genes that decide, markers that are known, units with a meaning of their own.

    python -m benchmarks.explanation --run runs/pbmc --store models_store
    python -m benchmarks.explanation --part orthogonality --store STORE      # with pbmc-saliency and pbmc-free in it

The first three parts explain held-out cells through the serving code. Deletion sets the 20 genes that speak most for a cell's label to zero
counts, and beside it 20 random other genes with the same counts in that very cell, and asks `annotate` again. The last part compares the
expression-saliency autoencoder with and without its constraint:

    python -m training fit training/configs/pbmc_saliency.yaml --output runs/pbmc_saliency
    python -m training fit training/configs/pbmc_saliency.yaml --output runs/pbmc_free --set name=pbmc-free --set model.orthogonality=0
    python -m training export runs/pbmc_saliency --store STORE        # and the other
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from benchmarks.machine import machine
from service.contract import artifact
from service.contract.impact import ImpactTable
from service.contract.store import Store
from service.inference import TASKS
from service.inference import model as serving
from service.inference.model import Model
from service.inference.session import Runtime
from training import run as runs

RESULT = Path(__file__).with_suffix(".json")
TASK = TASKS["explain"]
N_PER_CLASS, N_DELETED, SEED = 30, 20, 0
MARKERS = {
    "B": ("CD79A", "MS4A1"),
    "NK": ("NKG7", "GNLY"),
    "Monocyte": ("LYZ", "CD14"),
    "CD34+ progenitor": ("CD34", "SPINK2", "PRSS57"),
    "CD8 T": ("CD8A", "CD8B"),
    "Dendritic": ("FCER1A",),
    "Platelet": ("PPBP", "PF4"),
}
SIGNIFICANT = 0.05


def explained(model: Model, counts: sp.csr_matrix, **options: str) -> dict[str, Any]:
    """The columns of the task for some cells."""
    return dict(TASK.run(model, counts, TASK.read_options(options, model)))


def completeness(model: Model, counts: sp.csr_matrix) -> list[dict[str, Any]]:
    """Errors by what is explained and from which baseline, with 32 steps to begin with."""
    found = []
    for name, target in (("predicted label", {}), ("unit 0", {"unit": "0"}), ("unit 3", {"unit": "3"})):
        for baseline in ("empty", "mean"):
            columns = explained(model, counts, baseline=baseline, top="1", **target)
            error, steps = columns["completeness_error"].values, columns["n_steps"].values
            found.append(
                {
                    "explained": name,
                    "baseline": baseline,
                    "error_median": float(np.median(error)),
                    "error_max": float(error.max()),
                    "share_below_1_percent": float((error < 0.01).mean()),
                    "steps_mean": float(steps.mean()),
                }
            )
    return found


def deletion(model: Model, counts: sp.csr_matrix) -> dict[str, Any]:
    """How far the label's probability falls without the genes that speak for it, and without others of the same counts."""
    random = np.random.default_rng(SEED)
    columns = explained(model, counts, top="all")
    codes, attribution = columns["explained"].codes, columns["attribution"].values
    dense = counts.toarray()
    without, control = dense.copy(), dense.copy()
    for row in range(len(dense)):
        first = np.argsort(-attribution[row], kind="stable")[:N_DELETED]
        first = first[attribution[row, first] > 0]
        # Of the counts of each, another gene of this cell; the nearest count where no other has the same.
        others = random.permutation(np.setdiff1d(np.flatnonzero(dense[row]), first))
        taken: list[int] = []
        for gene in first:
            free = others[~np.isin(others, taken)]
            if len(free):
                taken.append(int(free[np.abs(dense[row, free] - dense[row, gene]).argmin()]))
        without[row, first], control[row, taken] = 0, 0
    level = model.manifest.labels[0].name
    p = [
        model.classify(sp.csr_matrix(cells))[level][np.arange(len(codes)), codes] for cells in (dense, without, control)
    ]
    change = {"top": p[0] - p[1], "random": p[0] - p[2]}
    return {
        "n_cells": len(dense),
        "n_deleted": N_DELETED,
        **{f"probability_lost_{name}_mean": float(lost.mean()) for name, lost in change.items()},
        **{f"probability_lost_{name}_median": float(np.median(lost)) for name, lost in change.items()},
        **{f"label_changed_{name}": float((after < 0.5).mean()) for name, after in (("top", p[1]), ("random", p[2]))},
    }


def markers(model: Model, counts: sp.csr_matrix, truth: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Rank of known markers for their labels: per query (mean over held-out cells of the label) and in the model's table."""
    classes, table = model.manifest.labels[0].classes, model.impact
    assert table is not None, "the artifact has a table of impacts"
    found = []
    for label, genes in MARKERS.items():
        at = classes.index(label)
        cells = counts[np.flatnonzero(truth == at)]
        query = explained(model, cells, label=label, top="all")["attribution"].values.mean(axis=0)
        rankings = {
            "query": query,
            "table_attribution": table.attribution[at],
            "table_impact": table.impact[model.manifest.n_latent + at],
        }
        for gene in genes:
            position = model.genes.find(gene)
            entry: dict[str, Any] = {"label": label, "gene": gene, "n_cells": int(cells.shape[0])}
            for name, values in rankings.items():
                rank = int((values > values[position]).sum()) + 1 if position >= 0 else None
                entry[f"rank_{name}"] = rank
            found.append(entry)
    return found


def units(model: Model) -> list[dict[str, Any]]:
    """First genes and gene sets of every unit."""
    table = model.impact
    assert table is not None, "the artifact has a table of impacts"
    found = []
    for unit in range(model.manifest.n_latent):
        sets = np.lexsort((-table.set_impact[unit], table.set_p[unit]))[:3]
        genes = [model.genes.display(int(at)) for at in np.argsort(-table.impact[unit], kind="stable")[:5]]
        terms = [
            {"name": table.set_names[at], "q": float(table.set_q[unit, at])}
            for at in sets
            if table.set_q[unit, at] < SIGNIFICANT
        ]
        found.append(
            {"unit": unit, "genes": genes, "n_sets": int((table.set_q[unit] < SIGNIFICANT).sum()), "sets": terms}
        )
    return found


def separation(model: Model, counts: sp.csr_matrix) -> dict[str, Any]:
    """How far the units of a model are from each other: over cells, by their genes and by their gene sets."""
    table = model.impact
    assert table is not None, "the artifact has a table of impacts"
    latent, n_units = model.encode(counts).astype(np.float64), model.manifest.n_latent
    alive = latent.std(axis=0) > 1e-6
    return {
        "n_units": n_units,
        "n_units_alive": int(alive.sum()),
        "correlation_of_values_mean": _off_diagonal(latent[:, alive].T),
        "correlation_of_impacts_mean": _off_diagonal(table.impact[:n_units][alive]),
        **_kept(table, np.flatnonzero(alive)),
    }


def _kept(table: ImpactTable, alive: NDArray[np.int64]) -> dict[str, Any]:
    """Gene sets with q below 0.05 in one unit alone, those in several, and the share of all that each unit keeps to itself."""
    of_unit = table.set_q[alive] < SIGNIFICANT
    n_of_set = of_unit.sum(axis=0)
    kept = (of_unit & (n_of_set == 1)).sum(axis=1)
    # As in the paper's heat maps: the unit where a set's impact is largest is its own.
    own = np.bincount(table.set_impact[alive].argmax(axis=0), minlength=len(alive))
    return {
        "n_sets_of_any_unit": int((n_of_set > 0).sum()),
        "n_sets_of_one_unit": int((n_of_set == 1).sum()),
        "units_per_set_mean": float(n_of_set[n_of_set > 0].mean()) if (n_of_set > 0).any() else 0.0,
        "sets_kept_per_unit_mean": float(kept.mean()),
        "units_with_a_set_of_their_own": int((kept > 0).sum()),
        "units_where_any_set_is_strongest": int((own > 0).sum()),
    }


def _off_diagonal(rows: NDArray[np.floating[Any]]) -> float:
    """Mean size of the correlation between different rows."""
    correlation = np.abs(np.corrcoef(rows))
    return float(correlation[~np.eye(len(rows), dtype=bool)].mean())


def held_out(run: runs.Run) -> tuple[sp.csr_matrix, NDArray[np.int64]]:
    """Held-out cells over the model's genes, at most some of each class, and their classes."""
    cells = run.test_cells
    level = run.config.labels[0]
    labels = cells.obs[level.name].astype(str).to_numpy()
    chosen = [np.flatnonzero(labels == name)[:N_PER_CLASS] for name in level.classes]
    truth = np.concatenate([np.full(len(found), k) for k, found in enumerate(chosen)])
    return cells.X.tocsr()[np.concatenate(chosen)], truth


def load(store: Path, name: str) -> Model:
    """A model of a store, by `default`."""
    found = Store(store)
    return serving.load(artifact.read(found.path(found.resolve(name))), Runtime())


def main() -> int:
    """Measure what is asked for, and put it into the result beside what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("labels", "orthogonality"), default="labels")
    parser.add_argument("--run", type=Path, default=Path("runs/pbmc"))
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    run = runs.load(arguments.run)
    if arguments.part == "labels":
        model = load(arguments.store, run.config.name)
        counts, truth = held_out(run)
        result |= {
            "machine": machine(),
            "n_cells": len(truth),
            "completeness": completeness(model, counts),
            "deletion": deletion(model, counts),
            "markers": markers(model, counts, truth),
            "units": units(model),
        }
    else:
        names = {"with": "pbmc-saliency", "without": "pbmc-free"}
        cells = run.test_cells.X.tocsr()
        result["orthogonality"] = {key: separation(load(arguments.store, name), cells) for key, name in names.items()}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
