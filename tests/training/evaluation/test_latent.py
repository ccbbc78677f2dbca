"""Clusters and labels: scores of latents whose right answer is known."""

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from training.evaluation.latent import agreement, compare, silhouette

N = 300
LABELS = np.repeat(np.arange(3), N // 3)
PERFECT = (np.eye(3)[LABELS] * 10 + np.random.default_rng(0).normal(0, 0.1, (N, 3))).astype(np.float32)


def test_a_perfect_latent_scores_one() -> None:
    """By k-means, by clusters that are called otherwise, and close to one by silhouette."""
    found = agreement(PERFECT, {"type": LABELS}, (2 - LABELS), 0)["type"]
    for kind in ("kmeans", "mixture"):
        assert {name: found[kind][name] for name in ("ari", "ami", "nmi")} == pytest.approx(
            {"ari": 1.0, "ami": 1.0, "nmi": 1.0}
        )
    assert found["mixture"]["n_clusters"] == 3
    assert found["silhouette"] > 0.95


def test_a_shuffled_latent_scores_zero() -> None:
    """Adjusted scores are 0 for chance, NMI a little more."""
    shuffled = np.random.default_rng(1).permutation(PERFECT)
    found = agreement(shuffled, {"type": LABELS}, None, 0)["type"]
    assert {name: abs(value) < 0.03 for name, value in found["kmeans"].items()} == dict.fromkeys(
        ("ari", "ami", "nmi"), True
    )
    assert abs(found["silhouette"]) < 0.05
    assert "mixture" not in found


def test_clusters_that_are_not_of_the_mixture_do_not_count() -> None:
    """Merging two classes costs; k-means stays perfect."""
    found = agreement(PERFECT, {"type": LABELS}, np.minimum(LABELS, 1), 0)["type"]
    assert found["kmeans"]["ari"] == pytest.approx(1.0)
    assert 0.4 < found["mixture"]["ari"] < 0.7
    assert found["mixture"] == {"n_clusters": 2, **compare(LABELS, np.minimum(LABELS, 1))}


def test_cells_without_a_label_do_not_count() -> None:
    """Nor do levels of one class."""
    partly = LABELS.copy()
    partly[::3] = -1
    found = agreement(PERFECT, {"type": partly, "one": np.zeros(N, dtype=np.int64), "none": np.full(N, -1)}, None, 0)
    assert list(found) == ["type"]
    assert (found["type"]["n_cells"], found["type"]["n_classes"]) == (200, 3)


def test_the_silhouette_is_scikit_learns() -> None:
    """All pairs of cells, euclidean; none where there is one class."""
    points = np.random.default_rng(2).normal(size=(50, 2)).astype(np.float32)
    classes = np.arange(50) % 4
    assert silhouette(points, classes, 0) == pytest.approx(silhouette_score(points, classes))
    assert silhouette(points, np.zeros(50, dtype=np.int64), 0) is None


def test_a_collapsed_latent_scores_zero_without_a_warning() -> None:
    """All cells at one point."""
    found = agreement(np.zeros((N, 2), dtype=np.float32), {"type": LABELS}, None, 0)["type"]
    assert found["kmeans"]["ari"] == 0
    assert found["silhouette"] == 0
