"""Majority labels: the vote of each cluster."""

import numpy as np
import pytest

from service.client import majority_labels as client_majority_labels
from service.client import over_cluster
from service.inference.majority import majority_labels

WORDS = ("B", "T", "Unknown")
CLUSTERS = ("x", "x", "x", "y", "y", "z")
CODES = np.array([0, 0, 1, 1, 2, 2], dtype=np.int32)


def test_the_most_frequent_label_wins() -> None:
    """With its share; of two as frequent the earlier word."""
    votes = majority_labels(CLUSTERS, CODES, WORDS)
    assert {name: vote.majority_label for name, vote in votes.items()} == {"x": "B", "y": "T", "z": "Unknown"}
    assert votes["x"].share == pytest.approx(2 / 3)
    assert votes["x"].labels == pytest.approx({"B": 2 / 3, "T": 1 / 3})
    assert [vote.n_cells for vote in votes.values()] == [3, 2, 1]


def test_a_share_that_is_not_reached() -> None:
    """Makes a cluster heterogeneous; exactly the share is enough."""
    found = {name: vote.majority_label for name, vote in majority_labels(CLUSTERS, CODES, WORDS, 0.6).items()}
    assert found == {"x": "B", "y": "Heterogeneous", "z": "Unknown"}
    assert majority_labels(CLUSTERS, CODES, WORDS, 0.5)["y"].majority_label == "T"


def test_the_client_votes_alike() -> None:
    """The same labels, given to each cell."""
    labels, shares = client_majority_labels([WORDS[code] for code in CODES], CLUSTERS, 0.6)
    assert labels == ["B", "B", "B", "Heterogeneous", "Heterogeneous", "Unknown"]
    assert shares == pytest.approx({"x": 2 / 3, "y": 0.5, "z": 1.0})


def test_over_clusters_are_the_same_each_time() -> None:
    """Seeded; each cluster of well separated ones is pure."""
    random = np.random.default_rng(0)
    kind = np.arange(300) % 3
    latent = random.normal(0, 0.1, (300, 4)) + 5 * np.eye(4)[kind]
    first = over_cluster(latent, 12)
    assert first == over_cluster(latent, 12)
    assert len(set(first)) > 3
    assert all(len({int(kind[i]) for i in range(300) if first[i] == name}) == 1 for name in set(first))
    assert set(over_cluster(latent[:5])) == {"0"}
