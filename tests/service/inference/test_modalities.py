"""Values beside expression, the average batch as a code of its own, and batches that the reference does not have."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from service.cells.columns import Vectors
from service.contract import artifact
from service.contract.manifest import Manifest
from service.errors import InvalidArtifact, InvalidOption
from service.inference import TASKS
from service.inference.model import Model, load
from service.inference.reconstruct import ReconstructOptions
from service.inference.session import Runtime
from tests.builders import PROTEINS, counts, parts, write_artifact

MODALITY = {
    "name": "protein",
    "features": list(PROTEINS),
    "unit": "counts",
    "quality_metric": "correlation",
    "quality": {"CD3": 0.5},
}
BATCH = {"names": ["one", "two"], "average_index": 2, "unseen": "default"}


def loaded(root: Path, **changes: Any) -> Model:
    """The tiny model with proteins."""
    changes = {"modalities": [MODALITY], "batch": BATCH, **changes}
    return load(artifact.read(write_artifact(root, has_protein=True, **changes)), Runtime())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """It takes the average batch as the code 2, and other batches for the default."""
    return loaded(tmp_path_factory.mktemp("store"))


def test_modalities_are_columns(model: Model) -> None:
    """Each is named by its features, beside expression and with the same cells."""
    columns = TASKS["reconstruct"].run(model, counts(3), ReconstructOptions())
    protein = columns["protein"]

    assert isinstance(protein, Vectors)
    assert protein.names == PROTEINS
    assert protein.values.shape == (3, 2)
    direct = model.decode_all(model.encode(counts(3)), np.ones(3, np.float32), "one")["protein"]
    assert protein.values.tobytes() == direct.tobytes()


def test_the_head_says_how_good_they_are(model: Model) -> None:
    """Unit and quality travel with every answer, and that nothing was measured."""
    about = ReconstructOptions().about(model)["modalities"]["protein"]

    assert about == {"unit": "counts", "is_measured": False, "quality_metric": "correlation", "quality": {"CD3": 0.5}}


def test_the_average_is_a_code(model: Model, tmp_path: Path) -> None:
    """With an index for it the decoder is run once with that code; without, expressions are averaged; the head says which."""
    other = loaded(tmp_path, batch={"names": ["one", "two"]})
    latent, library = model.encode(counts(4)), np.full(4, 100, np.float32)
    direct = model.sessions["decode"].run({"latent": latent, "library": library, "batch": np.full(4, 2)})

    assert model.decode(latent, library, "average").tobytes() == direct["expression"].tobytes()
    assert not np.allclose(other.decode(latent, library, "average"), direct["expression"])
    assert ReconstructOptions().about(model)["batch"]["average_of"] == "batch codes"
    assert ReconstructOptions().about(other)["batch"]["average_of"] == "expressions"


def test_modalities_are_averaged_as_expression_is(tmp_path: Path) -> None:
    """The mean over batches is that of each output."""
    model = loaded(tmp_path, batch={"names": ["one", "two"]})
    latent, library = model.encode(counts(4)), np.full(4, 100, np.float32)
    whole = [model.decode_all(latent, library, batch) for batch in ("one", "two", "average")]

    for name in ("expression", "protein"):
        np.testing.assert_allclose((whole[0][name] + whole[1][name]) / 2, whole[2][name], rtol=1e-6)


@pytest.mark.parametrize(("default", "is_average"), [("average", True), ("two", False)])
def test_an_unseen_batch_is_decoded_as_the_default(tmp_path: Path, default: str, is_average: bool) -> None:
    """The average or a named one, and the head says that it is not the one asked for."""
    model = loaded(tmp_path, batch={**BATCH, "decode_default": default})
    options = ReconstructOptions(batch="three")
    options.check(model)
    about = options.about(model)["batch"]
    run = TASKS["reconstruct"].run

    assert (about["asked"], about["decoded_as"], about["is_known"]) == ("three", default, False)
    assert ("average_of" in about) is is_average
    found, wanted = (run(model, counts(3), ReconstructOptions(batch=batch)) for batch in ("three", default))
    assert found["expression"].values.tobytes() == wanted["expression"].values.tobytes()
    assert ReconstructOptions(batch="two").about(model)["batch"]["is_known"]


def test_an_unseen_batch_is_refused_where_the_manifest_says_nothing(tiny: Model) -> None:
    """Old manifests keep their meaning."""
    assert (tiny.manifest.batch.unseen, tiny.manifest.batch.average_index) == ("refuse", None)
    with pytest.raises(InvalidOption, match="one, two"):
        ReconstructOptions(batch="three").check(tiny)
    assert ReconstructOptions().about(tiny) == {
        "batch": {"asked": None, "decoded_as": "average", "is_known": True, "average_of": "expressions"}
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "expression"}, "another column"),
        ({"name": "surface"}, "no output surface"),
        ({"features": ["CD3"]}, r"shape \[n, 1\]"),
        ({"features": ["CD3", "CD3"]}, "repeat"),
        ({"features": []}, "at least 1"),
        ({"quality": {"CD8": 1.0}}, "CD8"),
    ],
)
def test_a_modality_that_decode_does_not_give(change: dict[str, Any], problem: str) -> None:
    """What a manifest promises must be an output of its shape."""
    document, _ = parts(has_protein=True, modalities=[{**MODALITY, **change}])
    with pytest.raises(ValidationError, match=problem):
        Manifest.model_validate(document)


def test_an_average_index_that_the_graph_does_not_have(tmp_path: Path) -> None:
    """An index below zero is refused."""
    with pytest.raises((ValidationError, InvalidArtifact)):
        loaded(tmp_path, batch={**BATCH, "average_index": -1})
