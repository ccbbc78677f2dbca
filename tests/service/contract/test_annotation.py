"""What a manifest says of labels: levels that divide one another, and parts that need each other."""

from copy import deepcopy
from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.annotation import LabelLevel, check_parents, parent_codes
from service.contract.manifest import Manifest
from tests import builders

BROAD = LabelLevel(name="broad", classes=("T", "B"), ontology_ids=(None, None))


def fine(**changes: Any) -> LabelLevel:
    return LabelLevel.model_validate(
        {
            "name": "fine",
            "classes": ("B", "CD4 T", "CD8 T"),
            "ontology_ids": (None, None, None),
            "parent": "broad",
            "parents": ("B", "T", "T"),
            **changes,
        }
    )


def test_each_class_knows_its_parent() -> None:
    """As a position in the parent level."""
    check_parents((BROAD, fine()))
    assert parent_codes((BROAD, fine()), fine()).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("levels", "problem"),
    [
        ((fine(), BROAD), "which does not come before it"),
        ((BROAD, fine(parent="other")), "'other', which does not come before it"),
        ((BROAD, fine(parents=("B", "T", "NK"))), "'NK', which is no class of 'broad'"),
        ((BROAD, fine(parents=("T", "T", "T"))), "'B' of 'broad' has no class of 'fine' below it"),
    ],
)
def test_levels_that_do_not_fit_are_refused(levels: tuple[LabelLevel, ...], problem: str) -> None:
    """With the level and the class."""
    with pytest.raises(ValueError, match=problem):
        check_parents(levels)


@pytest.mark.parametrize("changes", [{"parents": ("B", "T")}, {"parents": ()}, {"parent": None}])
def test_every_class_has_a_parent_or_none_has(changes: dict[str, Any]) -> None:
    """A level is divided whole."""
    with pytest.raises(ValidationError, match="parents"):
        fine(**changes)


def without(*members: str) -> dict[str, Any]:
    document = deepcopy(builders.parts(is_calibrated=True)[0])
    for member in members:
        del document[member]
    return document


def test_a_calibrated_manifest_is_valid() -> None:
    """With all of it, and without the parts that may be left out."""
    assert Manifest.model_validate(without()).unknown is not None
    assert Manifest.model_validate(without("calibration")).calibration == {}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (without("unknown"), "unknown and the graph map_score come together"),
        (
            without() | {"calibration": {"organ": without()["calibration"]["cell_type"]}},
            "'organ', which is no label level",
        ),
        (without() | {"labels": without()["labels"][:1]}, "conformal names 'cell_subtype'"),
        (
            without() | {"files": {k: v for k, v in without()["files"].items() if "/" not in k}},
            "does not list reference/",
        ),
    ],
)
def test_parts_need_each_other(document: dict[str, Any], problem: str) -> None:
    """A manifest never names what is not there."""
    with pytest.raises(ValidationError, match=problem):
        Manifest.model_validate(document)
