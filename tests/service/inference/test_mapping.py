"""map: neighbours, votes, where they disagree with the classifier, and coordinates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from service.cells.columns import Columns, LabelLists
from service.contract import artifact
from service.contract.manifest import Manifest, Vote
from service.errors import InvalidOption
from service.inference import TASKS, neighbours
from service.inference.annotate import UNKNOWN
from service.inference.mapping import UNLABELLED, MapOptions
from service.inference.model import Model, load
from service.inference.session import Runtime
from tests.builders import CLASSES, N_GENES, N_REFERENCE, counts, parts, write_artifact

WAY = {"n_neighbours": 2, "answers": {}}


def mapped(model: Model, matrix: sp.csr_matrix, **options: Any) -> Columns:
    return TASKS["map"].run(model, matrix, MapOptions(**options))


def test_neighbours_are_named(tiny: Model) -> None:
    """Ids, distances and labels are those of the reference cells nearest to the latent, nearest first."""
    found = mapped(tiny, counts(4), k=5)
    assert tiny.reference is not None
    positions, distances = tiny.reference.search(tiny.encode(counts(4)), 5)
    cells, ids, labels = tiny.reference.cells, found["neighbours"], found["neighbour_labels"]

    assert isinstance(ids, LabelLists)
    assert ids.codes.tolist() == positions.tolist()
    assert ids.words == cells.cell_ids == tuple(f"set/{number}" for number in range(N_REFERENCE))
    assert found["neighbour_distances"].values.tobytes() == distances.astype(np.float32).tobytes()
    assert (np.diff(distances, axis=1) >= 0).all()
    words = [[labels.words[code] for code in row] for row in labels.codes]
    assert words == [[(*CLASSES, UNLABELLED)[cells.labels["cell_type"][at]] for at in row] for row in positions]


def test_a_cell_without_a_label_is_no_class(tiny: Model) -> None:
    """The last reference cell has none: it is Unlabelled, and not the last class."""
    found = mapped(tiny, counts(1), k=N_REFERENCE)
    at = found["neighbours"].codes[0].tolist().index(N_REFERENCE - 1)
    labels = found["neighbour_labels"]
    assert labels.words[labels.codes[0, at]] == UNLABELLED


def test_votes_do_not_depend_on_k(tiny: Model) -> None:
    """As many vote as the manifest says, however many are given; `vote` says the same."""
    few, many = mapped(tiny, counts(20), k=1), mapped(tiny, counts(20), k=20)
    shares = neighbours.vote(tiny, tiny.encode(counts(20)))["cell_type"]
    for name in ("voted_labels", "vote_share", "is_disagreeing"):
        one, other = (getattr(c[name], "codes", getattr(c[name], "values", None)) for c in (few, many))
        assert one.tobytes() == other.tobytes()
    assert few["voted_labels"].codes.tolist() == shares.argmax(axis=1).tolist()
    assert few["vote_share"].values.tobytes() == shares.max(axis=1).tobytes()
    assert few["neighbours"].codes.shape == (20, 1)


def test_disagreement(tiny: Model) -> None:
    """Where the classifier's class is another than that of most votes; both stand in the answer."""
    found = mapped(tiny, counts(40))
    classified = tiny.classify(counts(40))["cell_type"].argmax(axis=1)
    assert found["classified_labels"].codes.tolist() == classified.tolist()
    assert found["is_disagreeing"].values.tolist() == (classified != found["voted_labels"].codes).tolist()
    assert 0 < found["is_disagreeing"].values.sum() < 40


def test_coordinates(tiny: Model) -> None:
    """Those that project gives for the latent."""
    found = mapped(tiny, counts(3))["umap"]
    direct = tiny.sessions["project"].run({"latent": tiny.encode(counts(3))})["umap"]
    assert found.names == ("umap_1", "umap_2")
    assert found.values.tobytes() == direct.tobytes()


def test_an_empty_cell_is_unknown(tiny: Model) -> None:
    """It has neighbours as any point has, but its label is Unknown and it disagrees with nobody."""
    found = mapped(tiny, sp.csr_matrix((1, N_GENES), dtype=np.float32))
    for name in ("voted_labels", "classified_labels"):
        assert found[name].words[found[name].codes[0]] == UNKNOWN
    assert (found["vote_share"].values[0], found["is_disagreeing"].values[0]) == (0, False)
    assert found["is_empty"].values.tolist() == [True]


@pytest.mark.parametrize(("weighting", "share"), [("uniform", 0.5), ("distance", (1 / 1.4) / (1 / 1.4 + 1 / 2.6) + 0)])
def test_shares_of_votes(weighting: str, share: float) -> None:
    """At distances 1 and 2 the mean of the squares is 2.5, so that the weights are 1 / 1.4 and 1 / 2.6."""
    labels = {"level": np.array([0, 1, 1, -1], np.int32)}
    found = neighbours.shares(
        Vote(weighting=weighting, **WAY), labels, {"level": 2}, np.array([[0, 1, 2]]), np.array([[1.0, 2.0, 3.0]])
    )["level"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[share, 1 - share]], rtol=1e-6)


def test_votes_that_are_none() -> None:
    """Neighbours without a label do not vote; without any vote the shares are 0. Copies of a cell all weigh the same."""
    labels = {"level": np.array([0, 1, -1, -1], np.int32)}
    for weighting in ("uniform", "distance"):
        found = neighbours.shares(
            Vote(weighting=weighting, **WAY),
            labels,
            {"level": 2},
            np.array([[2, 3], [2, 1], [0, 1]]),
            np.array([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]),
        )["level"]
        assert found.tolist() == [[0, 0], [0, 1], [0.5, 0.5]]


def test_a_model_that_lacks_things(tmp_path: Path) -> None:
    """Without labels there is no vote, without project no coordinates; neighbours are named all the same."""
    document, contents = parts()
    document["reference"].update(vote=None, umap=None)
    del document["graphs"]["project"], contents["project.onnx"], contents["reference/umap.npy"]
    del document["golden"]["tolerance"]["project/umap"]
    document["files"] = {name: file.model_dump() for name, file in artifact.describe(contents).items()}
    path = artifact.write(tmp_path, Manifest.model_validate(document), contents)
    model = load(artifact.read(path), Runtime())
    assert list(mapped(model, counts(2))) == ["neighbours", "neighbour_distances", "is_empty"]
    assert "vote" not in MapOptions().about(model)["reference"]


def test_options(tiny: Model, tmp_path: Path) -> None:
    """More neighbours than there are cells are refused where they are asked for; the default takes what there is."""
    read = TASKS["map"].read_options
    with pytest.raises(InvalidOption, match="carries 23 reference cells"):
        read({"k": "24"}, tiny)
    for wrong in ("0", "101", "many"):
        with pytest.raises(InvalidOption, match="k"):
            read({"k": wrong}, tiny)
    assert read({}, tiny).about(tiny)["reference"]["vote"]["n_neighbours"] == 7
    assert mapped(tiny, counts(1))["neighbours"].codes.shape == (1, 15)


def test_a_model_without_reference_does_not_offer_it(tmp_path: Path) -> None:
    """Old artifacts load and offer what they did."""
    model = load(artifact.read(write_artifact(tmp_path, has_reference=False, is_explained=False)), Runtime())
    offered = [task.name for task in TASKS.values() if task.offered_by(model)]
    assert offered == ["embed", "reconstruct", "annotate", "describe"]
