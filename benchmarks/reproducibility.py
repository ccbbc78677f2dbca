"""How far do runs of one configuration lie apart? As shipped, with another seed each, and with threads that are not held to one order.

    make bench-reproducibility

One small autoencoder is trained three times in each way, each time in a process of its own; pairs of runs are then compared.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.linalg import orthogonal_procrustes
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from benchmarks.machine import machine

RESULT = Path(__file__).with_suffix(".json")
CONFIG = Path("training/configs/pbmc3k_autoencoder.yaml")
EMBEDDING = "embedding.npy"
N_RUNS, N_EPOCHS, N_NEIGHBOURS = 3, 40, 15
N_CLUSTERS = 8
"""Cell types that the authors of scanpy's tutorial give to these cells."""

WAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "as_shipped": ((),) * N_RUNS,
    "other_seeds": tuple((f"seed={seed}",) for seed in range(1, N_RUNS + 1)),
    "two_threads": (("fit.n_threads=2", "fit.deterministic=false"),) * N_RUNS,
}
"""Changes of the configuration, for each run of a way. A seed gives the split and with it the chosen genes, the weights, the order."""


@dataclass(frozen=True)
class Trained:
    """What is compared of a run."""

    weights: str
    """sha256 of weights.npz."""

    loss: float
    """Mean over training cells, in the epoch whose weights were kept."""

    embedding: NDArray[np.float64]
    """(n_cells, n_latent), all cells in the order of the file."""

    neighbours: NDArray[np.int64]
    """(n_cells, N_NEIGHBOURS), nearest first, by Euclidean distance; a cell is not its own."""

    clusters: NDArray[np.int64]
    """(n_cells,), by k-means with a fixed seed."""


def train(directory: Path, settings: tuple[str, ...]) -> None:
    """Fit one run and embed all cells, with one thread whatever it was trained with."""
    import torch

    from training import config as configuration
    from training import run
    from training.evaluation.cells import encode

    config = configuration.load(CONFIG, (f"fit.max_epochs={N_EPOCHS}", "fit.device=cpu", *settings))
    made = run.fit(config, directory, show_progress=False)
    torch.set_num_threads(1)
    counts = made.reference[:, made.prepared.var.index].X
    np.save(directory / EMBEDDING, encode(made.family, counts).numpy())


def read(directory: Path) -> Trained:
    """A run, with the neighbours and clusters of its embedding."""
    import pandas as pd

    best = json.loads((directory / "provenance.json").read_text())["best_epoch"]
    losses = pd.read_csv(directory / "metrics.csv").set_index("epoch")["train_loss"]
    embedding = np.load(directory / EMBEDDING, allow_pickle=False).astype(np.float64)
    return Trained(
        weights=hashlib.sha256((directory / "weights.npz").read_bytes()).hexdigest(),
        loss=float(losses[best]),
        embedding=embedding,
        neighbours=NearestNeighbors(n_neighbors=N_NEIGHBOURS).fit(embedding).kneighbors(return_distance=False),
        clusters=KMeans(N_CLUSTERS, n_init=10, random_state=0).fit_predict(embedding),
    )


def compare(one: Trained, other: Trained) -> dict[str, float]:
    """How far two runs lie apart."""
    return {
        "loss": abs(one.loss - other.loss) / ((one.loss + other.loss) / 2),
        "embedding": embedding_distance(one.embedding, other.embedding),
        "neighbours": neighbour_overlap(one.neighbours, other.neighbours),
        "clusters": float(adjusted_rand_score(one.clusters, other.clusters)),
    }


def embedding_distance(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Norm of the difference of two centred embeddings (n, d), the first turned onto the second, over the root of the product of norms."""
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    # Equal matrices need no turn, and a computed one would differ from the identity in its last bits.
    turned = one if np.array_equal(one, other) else one @ orthogonal_procrustes(one, other)[0]
    return float(np.linalg.norm(turned - other) / np.sqrt(np.linalg.norm(one) * np.linalg.norm(other)))


def neighbour_overlap(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Mean over cells of the Jaccard index of their neighbours, both (n, k)."""
    k = one.shape[1]
    shared = np.array([len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True)])
    return float(np.mean(shared / (2 * k - shared)))


def summarise(pairs: Iterable[tuple[Trained, Trained]]) -> dict[str, Any]:
    """Mean and range of each measure over pairs of runs, and how many pairs have the same weights to the last bit."""
    pairs = list(pairs)
    compared = [compare(*pair) for pair in pairs]
    found: dict[str, Any] = {
        "n_pairs": len(pairs),
        "n_same_bytes": sum(one.weights == other.weights for one, other in pairs),
    }
    for name in compared[0]:
        values = [row[name] for row in compared]
        found[name] = {figure: float(f(values)) for figure, f in (("mean", np.mean), ("min", min), ("max", max))}
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Train what `folder` does not hold yet, and compare.

    Raises:
        RuntimeError: runs as shipped differ.
    """
    runs: dict[str, list[Trained]] = {}
    for way, changes in WAYS.items():
        runs[way] = []
        for number, settings in enumerate(changes):
            directory = folder / f"{way}_{number}"
            if not (directory / EMBEDDING).exists():
                print(f"training {directory.name}", flush=True)
                command = [sys.executable, "-m", "benchmarks.reproducibility", "--train", str(directory), *settings]
                subprocess.run(command, check=True)
            runs[way].append(read(directory))
    shipped, threaded = runs["as_shipped"], runs["two_threads"]
    result = {
        "machine": machine(),
        "config": str(CONFIG),
        "n_epochs": N_EPOCHS,
        "n_runs": N_RUNS,
        "n_cells": len(shipped[0].embedding),
        "n_latent": shipped[0].embedding.shape[1],
        "n_neighbours": N_NEIGHBOURS,
        "n_clusters": N_CLUSTERS,
        "sha256_of_weights": {way: [made.weights for made in found] for way, found in runs.items()},
        "training_loss": {way: [made.loss for made in found] for way, found in runs.items()},
        "between": {
            **{way: summarise(itertools.combinations(found, 2)) for way, found in runs.items()},
            "one_and_two_threads": summarise(itertools.product(shipped[:1], threaded)),
        },
    }
    if len({made.weights for made in shipped}) > 1:
        raise RuntimeError(f"Runs of the same configuration differ in their weights: {result['sha256_of_weights']}")
    return result


def main() -> None:
    """Train, compare, write, print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, help="keep the runs here, and use those that are here")
    arguments.add_argument("--output", type=Path, default=RESULT)
    arguments.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    found = arguments.parse_args()
    if found.train:
        train(found.train, tuple(found.settings))
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(found.runs or Path(scratch))
    found.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("between runs", "same bytes", "loss", "embedding", "neighbours", "clusters")
    for way, row in result["between"].items():
        figures = (
            f"{row[name]['mean']:.3g} ({row[name]['min']:.3g} to {row[name]['max']:.3g})"
            for name in ("loss", "embedding", "neighbours", "clusters")
        )
        table.add_row(way, f"{row['n_same_bytes']} of {row['n_pairs']}", *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
