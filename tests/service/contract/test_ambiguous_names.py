"""The table of names that are not taken: round trip, and what is no such table."""

import re

import pytest

from service.contract import artifact
from service.contract.ambiguous_names import Ambiguous, dump, parse
from service.contract.manifest import Manifest, MissingGenes
from service.errors import InvalidArtifact
from tests.builders import parts

NAMES = {"TWO": Ambiguous(("E1", "E2"), is_symbol=False), "OWN": Ambiguous(("E1",), is_symbol=True)}
TABLE = {
    "n_cells": 10,
    "n_sets": 5,
    "neighbour_distance": 1.0,
    "weight": (0.0, 1.0),
    "displacement_median": (0.0, 1.0),
    "displacement_90": (0.0, 2.0),
}


def test_round_trip() -> None:
    """What was written is read; the order of names leaves no trace."""
    assert parse(dump(NAMES)) == NAMES
    assert dump(NAMES) == dump(dict(reversed(NAMES.items())))
    assert parse(dump({})) == {}


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"", 1), (b"name\tgene_ids\n", 1), (dump(NAMES) + b"X\tE1\n", 4), (dump(NAMES) + b"X\tE1\tperhaps\n", 4)],
)
def test_what_is_no_table(content: bytes, line: int) -> None:
    """The line is named."""
    with pytest.raises(ValueError, match=f"line {line}"):
        parse(content)


def test_a_damaged_table_is_no_artifact(tmp_path) -> None:
    """It is refused with the file's name, as everything else of an artifact is."""
    document, contents = parts()
    contents["reference/ambiguous_names.tsv"] = b"nonsense\n"
    document["genes"]["ambiguous_names"] = "reference/ambiguous_names.tsv"
    document["files"] = {file: entry.model_dump() for file, entry in artifact.describe(contents).items()}
    with pytest.raises(InvalidArtifact, match=re.escape("ambiguous_names.tsv")):
        artifact.write(tmp_path, Manifest.model_validate(document), contents)


def test_a_table_that_is_not_there() -> None:
    """The manifest does not name what it does not list."""
    document, _ = parts()
    document["genes"]["ambiguous_names"] = "reference/ambiguous_names.tsv"
    with pytest.raises(ValueError, match="does not list reference/ambiguous_names"):
        Manifest.model_validate(document)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": (0.1, 1.0)},
        {"weight": (0.0, 0.0)},
        {"weight": (0.0, 0.5, 1.0)},
        {"displacement_90": (2.0, 1.0)},
        {"label_changes": (0.0,)},
        {"label_changes": (0.0, 1.5)},
        {"neighbour_distance": 0.0},
    ],
)
def test_missing_genes_check_themselves(change: dict) -> None:
    """Columns have one entry per weight, weights rise from 0, and nothing falls."""
    MissingGenes(**TABLE)
    with pytest.raises(ValueError, match="MissingGenes"):
        MissingGenes(**{**TABLE, **change})
