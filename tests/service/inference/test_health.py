"""The verdict on a query: limits, doublets, and what is compared with the reference."""

import numpy as np
import pytest

from service.cells.columns import Labels, Values, Vectors
from service.inference.health import (
    LIMITS,
    Finding,
    Limits,
    doublet_like,
    of_labels,
    well_mapped,
    without_probabilities,
    worst,
)


@pytest.mark.parametrize(
    ("value", "is_low_bad", "verdict"),
    [
        (0.1, False, "green"),
        (0.11, False, "amber"),
        (0.3, False, "amber"),
        (0.31, False, "red"),
        (0.3, True, "green"),
        (0.29, True, "amber"),
        (0.1, True, "amber"),
        (0.09, True, "red"),
    ],
)
def test_limits(value: float, is_low_bad: bool, verdict: str) -> None:
    """A limit itself is still the better colour, whichever side is bad."""
    limits = Limits(0.3, 0.1, is_low_bad=True) if is_low_bad else Limits(0.1, 0.3)
    assert limits.verdict(value) == verdict


def test_the_worst_counts() -> None:
    """One red thing among green ones makes a query red; nothing at all is green."""
    findings = [Finding("a", "green", 0, ""), Finding("b", "red", 0, ""), Finding("c", "amber", 0, "")]
    assert worst(findings) == "red"
    assert worst(findings[::2]) == "amber"
    assert worst([]) == "green"


def test_limits_are_in_order() -> None:
    """Red lies beyond amber."""
    assert all((limit.red < limit.amber) == limit.is_low_bad for limit in LIMITS.values())


def columns(codes: list[int], confidence: list[float], second: list[float], score: list[float] | None = None):
    """What a chunk's answer is reduced to."""
    found = {
        "predicted_labels": Labels(np.array(codes, np.int32), ("B", "T", "Unknown")),
        "conf_score": Values(np.array(confidence, np.float32)),
        "second_score": Values(np.array(second, np.float32)),
    }
    return found | ({"mapping_score": Values(np.array(score, np.float32))} if score else {})


def test_cells_that_map_well() -> None:
    """By the confidence, or where there is a mapping score by whether the cell is Unknown; an empty cell is neither."""
    filled = np.array([True, True, True, False])
    by_confidence, _ = well_mapped(columns([0, 1, 2, 0], [0.9, 0.4, 0.8, 0.9], [0] * 4), filled)
    assert by_confidence.tolist() == [True, False, True, False]
    by_score, how = well_mapped(columns([0, 1, 2, 0], [0.9, 0.4, 0.8, 0.9], [0] * 4, [0.5] * 4), filled)
    assert by_score.tolist() == [True, True, False, False]
    assert "mapping_score" in how


def test_doublets() -> None:
    """A second likely label and half as many counts again as cells of the label have; one of the two is not enough."""
    codes = [0] * 7
    found = doublet_like(
        columns(codes, [0.6] * 7, [0.3, 0.3, 0.1, 0.3, 0.0, 0.0, 0.0]),
        np.array(codes, np.int32),
        np.array([100, 160, 160, 140, 100, 100, 100], np.float32),
    )
    assert found.tolist() == [False, True, False, False, False, False, False]


def test_probabilities_are_made_small() -> None:
    """Of a chunk's answer the second highest probability is kept; a single class has none."""
    answer = {
        "predicted_labels": Labels(np.zeros(2, np.int32), ("B", "Unknown")),
        "conf_score": Values(np.ones(2, np.float32)),
        "probabilities": Vectors(np.array([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]], np.float32), ("a", "b", "c")),
        "is_empty": Values(np.zeros(2, bool)),
    }
    kept = without_probabilities(answer)
    assert set(kept) == {"predicted_labels", "conf_score", "second_score"}
    np.testing.assert_allclose(kept["second_score"].values, [0.3, 0.2])
    answer["probabilities"] = Vectors(np.ones((2, 1), np.float32), ("a",))
    assert without_probabilities(answer)["second_score"].values.tolist() == [0, 0]


def test_empty_cells_have_no_part_in_shares() -> None:
    """Neither in that of cells that map well, nor in the quantiles of their confidence."""
    findings, about = of_labels(columns([0, 0, 2], [0.9, 0.9, 0.0], [0, 0, 0]), np.array([50, 60, 0], np.float32))
    assert about["share_mapped_well"] == 1
    assert about["conf_score"]["0.05"] == pytest.approx(0.9)
    assert about["labels"] == pytest.approx({"B": 2 / 3, "Unknown": 1 / 3})
    assert worst(findings) == "green"
