"""What the annotation benchmark computes itself: figures of probabilities, medians over types and seeds, and what stays of earlier runs."""

import numpy as np
import pytest
from anndata import AnnData

from benchmarks import annotation


def test_figures_of_probabilities() -> None:
    """Of three cells, one of them wrong with 0.6: accuracy, F1 over the classes that occur, log-loss."""
    found = annotation.figures(
        np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0]]), np.array([0, 1, 1], dtype=np.int64)
    )
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.4, 0.8]).mean())
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0.6 + 0.2) / 3)


def test_the_error_that_right_probabilities_show() -> None:
    """None where they are certain, little for many cells, and for few about what drawn labels show."""
    random = np.random.default_rng(0)
    certain = np.eye(3)[random.integers(3, size=200)]
    assert annotation.ece_floor(certain, 0) == 0
    many, few = (random.dirichlet(np.full(3, 0.5), n) for n in (4_000, 100))
    assert annotation.ece_floor(many, 0) < 0.02 < annotation.ece_floor(few, 0) < 0.15
    assert annotation.ece_floor(few, 0) == annotation.ece_floor(few, 0)


def test_medians_over_types_and_seeds() -> None:
    """Over seeds of each type, and over seeds of the median over types, with and without those that are mere subtypes."""
    values = [
        {"B": 0.9, "NK": 0.7, "CD4 T": 0.5},
        {"B": 0.8, "NK": 1.0, "CD4 T": 0.6},
        {"B": 1.0, "NK": 0.8, "CD4 T": 0.4},
    ]
    seeds = [{name: {"ours": value} for name, value in one.items()} for one in values]
    for name in seeds[0]:
        seeds[0][name]["other"] = 0.5
    found = annotation.medians(seeds)
    assert found["types"]["B"]["ours"]["median"] == 0.9
    assert found["over_types"]["all types"]["ours"]["seeds"] == [0.7, 0.8, 0.8]
    assert found["over_types"]["no mere subtypes"]["ours"]["seeds"] == pytest.approx([0.8, 0.9, 0.9])
    assert found["types"]["NK"]["other"]["seeds"] == [0.5]


def test_what_was_not_asked_stays() -> None:
    """Other methods and other parts; a figure is replaced whole, with its seeds."""
    before = {
        "labels": {"ours": {"accuracy": {"median": 0.9, "seeds": [0.9]}}, "SCANVI": {"accuracy": {"median": 0.8}}},
        "unknown": {"types": {"B": {"ours": {"median": 0.7}, "SCANVI": {"median": 0.6}}}},
    }
    found = {
        "labels": {"ours": {"accuracy": {"median": 0.95}}},
        "unknown": {"types": {"B": {"ours": {"median": 0.75}}}},
        "prediction_sets": {annotation.OURS_APART: 6},
    }
    assert annotation.merged(before, found) == {
        "labels": {"ours": {"accuracy": {"median": 0.95}}, "SCANVI": {"accuracy": {"median": 0.8}}},
        "unknown": {"types": {"B": {"ours": {"median": 0.75}, "SCANVI": {"median": 0.6}}}},
        "prediction_sets": {annotation.OURS_APART: 6},
    }


def test_classes_that_a_method_does_not_know() -> None:
    """Columns come in the task's order, and unknown ones are 0."""
    task = annotation.Task(AnnData(), AnnData(), ("A", "B", "C"))
    found = annotation.in_order(task, np.array([[0.3, 0.7]]), np.array(["C", "A"]))
    assert found.tolist() == [[0.7, 0.0, 0.3]]
