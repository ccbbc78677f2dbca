"""Lung cancer lines of five batches: leave one technology out, and integrate all; ours beside scvi-tools and logistic regression.

All sides get the same cells over the same 2,000 genes, chosen from the cells that a task trains on; where spike-ins (ERCC) are among them, ours
do without, since they are no genes. Ours are the configurations in
training/configs/benchmarks/, chosen by the loss of validation cells (`--select` of quality.py); scvi-tools trains as its tutorials do.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from training import config as configuration
from training import run
from training.data import registry
from training.data.features import TrainingCells, select_genes
from training.run import Run

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "training/configs/benchmarks"
DROPSEQ = "sc_dropseq"
CELSEQ = ("sc_celseq2", "sc_celseq2_5cl_p1", "sc_celseq2_5cl_p2", "sc_celseq2_5cl_p3")
TASKS = {"CEL-seq2 → Drop-seq": (CELSEQ, (DROPSEQ,)), "Drop-seq → CEL-seq2": ((DROPSEQ,), CELSEQ)}
N_GENES, N_NEIGHBOURS = 2000, 15
GRID: dict[str, dict[str, Any]] = {
    "as configured": {},
    "hidden=256": {"model": {"hidden": [256]}},
    "input_dropout=0.2": {"model": {"input_dropout": 0.2}},
    "layer norm, one cycle of 100 epochs": {
        "model": {"layer_norm": True, "batch_norm": False},
        "fit": {"schedule": "one_cycle", "max_epochs": 100, "patience": 100},
    },
    "batch norm, 200 epochs, patience 45": {
        "model": {"layer_norm": False, "batch_norm": True},
        "fit": {"schedule": "constant", "max_epochs": 200, "patience": 45},
    },
}
"""What is tried for `--select`; all are losses of the same likelihood on the same cells, so that they compare."""

Answers = dict[str, NDArray[Any]]


def load_cells() -> ad.AnnData:
    """1,408 cells with `batch` and `label`."""
    cells = registry.read("cell_lines")
    cells.obs["label"] = cells.obs["cell_type_original"].astype(str)
    return cells


def with_genes(cells: ad.AnnData, chosen_on: NDArray[np.bool_]) -> ad.AnnData:
    """The cells over the genes that vary most among those of `chosen_on`."""
    batch = pd.factorize(cells.obs["batch"])[0][chosen_on]
    counts = sp.csr_matrix(cells.X)[chosen_on]
    rows = TrainingCells(counts, batch.astype(np.int64), np.full(len(batch), -1))
    return cells[:, select_genes(rows, "log_variance", N_GENES, 3)].copy()


def task_cells(cells: ad.AnnData, reference: tuple[str, ...], query: tuple[str, ...]) -> ad.AnnData:
    """Reference and query; query cells of lines that the reference lacks are left out, since nobody could name them."""
    is_reference, is_query = cells.obs["batch"].isin(reference), cells.obs["batch"].isin(query)
    is_query &= cells.obs["label"].isin(set(cells.obs["label"][is_reference]))
    kept = cells[(is_reference | is_query).to_numpy()].copy()
    kept.obs["part"] = np.where(kept.obs["batch"].isin(reference), "reference", "query")
    return with_genes(kept, (kept.obs["part"] == "reference").to_numpy())


def fit(
    name: str,
    cells: ad.AnnData,
    seed: int,
    held_out: tuple[str, ...] = (),
    settings: dict[str, dict[str, Any]] | None = None,
) -> Run:
    """Train the configuration `name` on the cells, but for batches held out."""
    base = configuration.load(CONFIGS / f"{name}.yaml").model_dump()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        cells.write_h5ad(path)
        classes = dict.fromkeys(sorted(set(cells.obs["label"][~cells.obs["batch"].isin(held_out)])))
        changes: dict[str, Any] = {
            "data": [{"name": "cell_lines", "path": path}],
            "genes": {
                "rule": "names",
                "names": [str(gene) for gene in cells.var["gene_id"] if str(gene).startswith("ENSG")],
            },
            # Where no batch is held out, each stratum lends one cell to a test that is not looked at: a configuration needs some.
            "split": {"method": "held_out", "held_out": held_out} if held_out else {"test": 0.001, "validation": 0.1},
            "labels": [{"name": "label", "classes": classes}] if base["labels"] else [],
            **{part: {**base[part], **(settings or {}).get(part, {})} for part in ("model", "fit")},
            "seed": seed,
        }
        return run.fit(
            configuration.Config.model_validate({**base, **changes}), Path(folder) / "run", show_progress=False
        )


def embed(fitted: Run, cells: ad.AnnData) -> tuple[NDArray[np.float32], NDArray[np.str_] | None]:
    """Latent of the cells, and the names that the classifier gives them."""
    graphs = fitted.family.eval().graphs()
    counts = sp.csr_matrix(cells[:, fitted.prepared.var.index].X, dtype=np.float32)
    with torch.no_grad():
        latent = graphs["encode"].module(torch.from_numpy(counts.toarray()))
        if "classify" not in graphs:
            return latent.numpy(), None
        codes = graphs["classify"].module(latent)[0].argmax(dim=1).numpy()
    return latent.numpy(), np.array(list(fitted.config.labels[0].classes))[codes]


def log_normalise(cells: ad.AnnData) -> sp.csr_matrix:
    """ln(1 + counts per 10,000)."""
    counts = sp.csr_matrix(cells.X, dtype=np.float64)
    return sp.csr_matrix(sp.diags(1e4 / np.maximum(counts.sum(axis=1).A1, 1.0)) @ counts).log1p()


@dataclass(frozen=True)
class ScviTools:
    """scvi-tools in a process and an environment of its own."""

    python: str
    cache: Path
    """Where its answers are kept, so that a change of our side needs no second training of theirs."""

    n_seeds: int

    def ask(self, cells: ad.AnnData, mode: str) -> list[Answers]:
        """What it makes of the cells, seed by seed; for the modes see scvi_quality.py."""
        return [self.ask_one(cells, mode, seed) for seed in range(self.n_seeds)]

    def ask_one(self, cells: ad.AnnData, mode: str, seed: int) -> Answers:
        """What it makes of the cells with one seed."""
        about = hashlib.sha256(sp.csr_matrix(cells.X).data.tobytes() + cells.obs.to_csv().encode()).hexdigest()
        kept = self.cache / f"{mode}-{about[:16]}-{seed}.npz"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                path, made = Path(folder) / "cells.h5ad", Path(folder) / "answers.npz"
                cells.write_h5ad(path)
                script = str(Path(__file__).with_name("scvi_quality.py"))
                command = [self.python, script, str(path), str(made), mode, str(seed), "1"]
                subprocess.run(command, check=True, stdout=sys.stderr)
                shutil.copy(made, kept)
        with np.load(kept) as arrays:
            return {name: arrays[name] for name in arrays.files}


def transfer_ours(cells: ad.AnnData, n_seeds: int) -> dict[str, list[float]]:
    """Accuracy on the query, by method and seed."""
    is_query = (cells.obs["part"] == "query").to_numpy()
    truth, known = cells.obs["label"][is_query].to_numpy(), cells.obs["label"][~is_query].to_numpy()
    held_out = tuple(sorted(set(cells.obs["batch"][is_query])))
    scores: dict[str, list[float]] = {"atlas_vae, its classifier": [], "atlas_vae, kNN(15) on its latent": []}
    for seed in range(n_seeds):
        latent, named = embed(fitted := fit("cell_lines_atlas_vae", cells, seed, held_out), cells)
        assert named is not None, fitted.config.name
        neighbours = KNeighborsClassifier(N_NEIGHBOURS).fit(latent[~is_query], known)
        scores["atlas_vae, its classifier"].append(accuracy_score(truth, named[is_query]))
        scores["atlas_vae, kNN(15) on its latent"].append(accuracy_score(truth, neighbours.predict(latent[is_query])))
    values = log_normalise(cells)
    regression = LogisticRegression(max_iter=1000).fit(values[~is_query], known)
    return scores | {"logistic regression": [accuracy_score(truth, regression.predict(values[is_query]))]}


def transfer_scvi(cells: ad.AnnData, answers: list[Answers], key: str) -> list[float]:
    """Accuracy of the names that scvi-tools gave the query, by seed."""
    truth = cells.obs["label"][cells.obs["part"] == "query"].to_numpy()
    return [accuracy_score(truth, one[key]) for one in answers]


def scib(cells: ad.AnnData, latents: dict[str, list[NDArray[np.float32]]]) -> dict[str, list[dict[str, float]]]:
    """Batch correction, bio conservation and total of scib-metrics, by method and seed."""
    from scib_metrics.benchmark import Benchmarker
    from scib_metrics.nearest_neighbors import NeighborsResults

    def neighbours(points: NDArray[np.float32], n_neighbours: int) -> NeighborsResults:
        # Exact, a cell itself first: for so few cells quicker than compiling the approximate search.
        found = NearestNeighbors(n_neighbors=n_neighbours).fit(points).kneighbors(points)
        return NeighborsResults(distances=found[0], indices=found[1])

    keys = {f"{method}/{seed}": latent for method, all_ in latents.items() for seed, latent in enumerate(all_)}
    values = ad.AnnData(log_normalise(cells).astype(np.float32), obs=cells.obs[["batch", "label"]].copy())
    values.obsm["X_pca"] = PCA(50, svd_solver="arpack", random_state=0).fit_transform(values.X)
    for key, latent in keys.items():
        values.obsm[key] = latent
    judge = Benchmarker(
        values, "batch", "label", list(keys), pre_integrated_embedding_obsm_key="X_pca", n_jobs=1, progress_bar=False
    )
    judge.prepare(neighbours)
    judge.benchmark()
    table = judge.get_results(min_max_scale=False)
    columns = {"batch": "Batch correction", "bio": "Bio conservation", "total": "Total"}
    return {
        method: [
            {short: float(table.loc[f"{method}/{seed}", column]) for short, column in columns.items()}
            for seed in range(len(all_))
        ]
        for method, all_ in latents.items()
    }


def joint_cells(cells: ad.AnnData) -> ad.AnnData:
    """All cells over genes chosen from all, with the part that each has in the tasks."""
    made = with_genes(cells, np.ones(cells.n_obs, bool))
    for name, (reference, query) in TASKS.items():
        part = task_cells(cells, reference, query).obs["part"]
        made.obs[f"part_{name}"] = part.reindex(made.obs_names).astype(object).fillna("unused").astype(str)
    return made


def measure(scvi: ScviTools, n_seeds: int) -> dict[str, Any]:
    """Everything of this data set."""
    cells = load_cells()
    everything = joint_cells(cells)
    chosen = {name: task_cells(cells, reference, query) for name, (reference, query) in TASKS.items()}
    accuracy = {name: transfer_ours(some, n_seeds) for name, some in chosen.items()}
    vae, atlas_vae = (
        [embed(fit(name, everything, seed), everything)[0] for seed in range(n_seeds)]
        for name in ("cell_lines_vae", "cell_lines_atlas_vae")
    )
    of_all = scvi.ask(everything, "joint")
    transfer: dict[str, Any] = {}
    for name, some in chosen.items():
        accuracy[name]["SCANVI, query mapped (scArches)"] = transfer_scvi(some, scvi.ask(some, "scarches"), "labels")
        accuracy[name]["SCANVI, trained with the query"] = transfer_scvi(some, of_all, f"labels/{name}")
        parts = some.obs["part"].value_counts()
        transfer[name] = {
            "n_reference": int(parts["reference"]),
            "n_query": int(parts["query"]),
            "accuracy": {method: summary(values) for method, values in accuracy[name].items()},
        }
    latents = {
        "vae": vae,
        "SCVI": [one["SCVI"] for one in of_all],
        "atlas_vae, with labels": atlas_vae,
        "SCANVI, with labels": [one["SCANVI"] for one in of_all],
    }
    found = scib(everything, latents)
    integration = {
        method: {part: summary([one[part] for one in all_]) for part in ("batch", "bio", "total")}
        for method, all_ in found.items()
    }
    return {"transfer": transfer, "integration": integration}


def summary(values: list[float]) -> dict[str, Any]:
    """Median over seeds, and each."""
    return {"median": round(median(values), 4), "seeds": [round(value, 4) for value in values]}


def select() -> dict[str, dict[str, float]]:
    """Validation loss of seed 0 for each row of GRID, by configuration; the query of the first task is held out."""
    cells = task_cells(load_cells(), *TASKS["CEL-seq2 → Drop-seq"])
    return {
        name: {
            row: round(fit(name, cells, 0, (DROPSEQ,), settings).provenance["best_validation_loss"], 2)
            for row, settings in GRID.items()
        }
        for name in ("cell_lines_atlas_vae", "cell_lines_vae")
    }
