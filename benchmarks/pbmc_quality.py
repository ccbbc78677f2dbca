"""Blood cells: clusters that gmvae finds without labels beside vae and k-means, and sc-autoencoder's experiment repeated."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from benchmarks.cell_lines import summary
from training import config as configuration
from training import run
from training.run import Run

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "training/configs"
PUBLISHED_ERROR = 0.3496
"""Training error of sc-autoencoder on pbmc3k after 1,000 epochs (mlf-core, runs on a GPU with determinism on)."""

ORTHOGONALITY = (0.0, 1.0)
N_CLUSTERS = 6


def fit(path: Path, *changes: str) -> Run:
    """A run of a configuration with settings replaced."""
    with tempfile.TemporaryDirectory() as scratch:
        return run.fit(configuration.load(path, changes), Path(scratch) / "run", show_progress=False)


def counts_of(made: Run) -> torch.Tensor:
    """Training cells, raw counts (n, n_genes)."""
    return torch.from_numpy(made.prepared.train.counts.toarray())


def agreement(truth: NDArray[np.int64], found: NDArray[np.int64]) -> dict[str, float]:
    """Of clusters with labels."""
    return {
        "ARI": float(adjusted_rand_score(truth, found)),
        "NMI": float(normalized_mutual_info_score(truth, found)),
    }


def truths(made: Run) -> dict[str, NDArray[np.int64]]:
    """What the training cells were sorted as: six types, and five with CD4 and CD8 T cells taken together."""
    types = made.reference[made.prepared.train.names].obs["cell_type"].astype(str)
    lineages = types.replace({"CD4 T": "T", "CD8 T": "T"})
    return {
        name: column.astype("category").cat.codes.to_numpy().astype(np.int64)
        for name, column in {"six sorted types": types, "five, T cells as one": lineages}.items()
    }


def cluster(made: Run) -> dict[str, NDArray[np.int64]]:
    """Six clusters by k-means of the latent, and the mixture's own."""
    counts = counts_of(made)
    with torch.no_grad():
        latent = made.family.graphs()["encode"].module(counts).numpy()
        clusters = made.family.clusters(counts)
    found = {f"{made.config.family}, k-means of the latent": k_means(latent)}
    if clusters is not None:
        found[f"{made.config.family}, its mixture"] = clusters.argmax(dim=1).numpy()
    return found


def k_means(points: NDArray[np.float32]) -> NDArray[np.int64]:
    """Six clusters."""
    labels: NDArray[np.int64] = KMeans(N_CLUSTERS, n_init=10, random_state=0).fit_predict(points)
    return labels


def principal_components(made: Run, seed: int) -> NDArray[np.float32]:
    """Ten of ln(1 + counts per 10,000) over the same genes."""
    counts = made.prepared.train.counts
    library = np.maximum(np.asarray(counts.sum(axis=1)), 1.0)
    points: NDArray[np.float32] = PCA(10, random_state=seed).fit_transform(np.log1p(counts.toarray() / library * 1e4))
    return points


def measure_facs(_: Any, n_seeds: int) -> dict[str, Any]:
    """Mixture and plain vae, without labels, on sorted cells whose sorting is the truth; k-means of principal components beside them."""
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for seed in range(n_seeds):
        runs = [fit(CONFIGS / f"benchmarks/facs_{family}.yaml", f"seed={seed}") for family in ("gmvae", "vae")]
        found = {"PCA(10), k-means": k_means(principal_components(runs[0], seed))}
        for made in runs:
            found |= cluster(made)
        for truth, labels in truths(runs[0]).items():
            for method, clusters in found.items():
                for name, value in agreement(labels, clusters).items():
                    scores.setdefault(truth, {}).setdefault(method, {}).setdefault(name, []).append(value)
    return {
        "clustering": {
            truth: {method: {name: summary(values) for name, values in one.items()} for method, one in methods.items()}
            for truth, methods in scores.items()
        }
    }


def measure_autoencoder(_: Any, n_seeds: int) -> dict[str, Any]:
    """sc-autoencoder's preprocessing and shape for 1,000 epochs, twice with one seed; and the orthogonality constraint on and off."""
    path = CONFIGS / "pbmc3k_autoencoder.yaml"
    errors, weights = [], []
    for _run in range(2):
        with tempfile.TemporaryDirectory() as scratch:
            made = run.fit(configuration.load(path), Path(scratch) / "run", show_progress=False)
            rows = (Path(scratch) / "run/metrics.csv").read_text().splitlines()
            errors.append(float(rows[-1].split(",")[rows[0].split(",").index("train_reconstruction")]))
        weights.append(made.family.state_dict())
    difference = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    saliency: dict[str, Any] = {}
    for weight in ORTHOGONALITY:
        runs = [
            fit(CONFIGS / "pbmc_saliency.yaml", f"model.orthogonality={weight}", f"seed={seed}")
            for seed in range(n_seeds)
        ]
        saliency[f"{weight:g}"] = {
            "||I - W Wᵀ||": summary([distance(made) for made in runs]),
            "NMI of k-means": summary([cluster_saliency(made)["NMI"] for made in runs]),
        }
    return {
        "training_error": {
            "epochs": 1000,
            "ours": errors,
            "published": PUBLISHED_ERROR,
            "largest_difference_of_weights": difference,
        },
        "orthogonality": saliency,
    }


def distance(made: Run) -> float:
    """||I - W Wᵀ||_F of the layer that gives the latent."""
    weight = made.family.state_dict()["to_latent.0.weight"]
    return float(torch.linalg.matrix_norm(torch.eye(len(weight)) - weight @ weight.T))


def cluster_saliency(made: Run) -> dict[str, float]:
    """k-means on the latent against the six sorted types, which the configuration does not mention."""
    with torch.no_grad():
        latent = made.family.graphs()["encode"].module(counts_of(made)).numpy()
    return agreement(truths(made)["six sorted types"], k_means(latent))
