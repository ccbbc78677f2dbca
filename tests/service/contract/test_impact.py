"""The table of impacts: what is written is read, and another model's table is not taken."""

import io
from pathlib import Path

import numpy as np
import pytest

from service.contract import artifact
from service.contract.impact import ImpactTable
from service.contract.manifest import Manifest
from service.errors import InvalidArtifact
from service.inference import model as serving
from service.inference.session import Runtime
from tests.builders import CLASSES, N_GENES, N_LATENT, SETS, impact_table, parts


def dumped(**changes: np.ndarray) -> bytes:
    """The bytes of the tiny model's table with arrays replaced."""
    buffer = io.BytesIO()
    np.savez(buffer, **{**impact_table().arrays(), **changes})
    return buffer.getvalue()


def test_round_trip() -> None:
    """Every array and every name comes back."""
    read = ImpactTable.parse(dumped(), N_LATENT, len(CLASSES), N_GENES)

    assert read.set_names == SETS
    assert all(array.tobytes() == read.arrays()[name].tobytes() for name, array in impact_table().arrays().items())


def test_no_sets() -> None:
    """A model may have been looked at without gene sets."""
    empty = {name: array[..., :0] for name, array in impact_table().arrays().items() if name.startswith("set_")}
    assert ImpactTable.parse(dumped(**empty), N_LATENT, len(CLASSES), N_GENES).set_names == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"impact": np.zeros((2, N_GENES), np.float32)},
        {"set_q": np.full((N_LATENT + len(CLASSES), len(SETS)), np.nan, np.float32)},
        {"more": np.zeros(1)},
    ],
)
def test_tables_of_another_shape(changes: dict[str, np.ndarray], tmp_path: Path) -> None:
    """They are refused when the model is loaded, with the file's name."""
    document, contents = parts()
    contents["reference/impact.npz"] = dumped(**changes)
    document["files"] = {file: entry.model_dump() for file, entry in artifact.describe(contents).items()}
    path = artifact.write(tmp_path, Manifest.model_validate(document), contents)

    with pytest.raises(InvalidArtifact, match=r"impact\.npz.*table of impacts"):
        serving.load(artifact.read(path), Runtime())


def test_the_manifest_names_a_file_that_is_listed() -> None:
    """A table that is not among the files is refused."""
    document, _ = parts()
    del document["files"]["reference/impact.npz"]
    with pytest.raises(ValueError, match=r"files does not list reference/impact\.npz"):
        Manifest.model_validate(document)


def test_explain_must_fit_the_model() -> None:
    """Its direction has a place for every unit and every class."""
    document, _ = parts()
    document["graphs"]["explain"]["inputs"][1]["shape"] = ["n", N_LATENT]
    with pytest.raises(ValueError, match="do not fit n_genes, n_latent or labels"):
        Manifest.model_validate(document)
