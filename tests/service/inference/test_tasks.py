"""Every task of TASKS, run as plain functions."""

import numpy as np
import pytest
import scipy.sparse as sp

from service.cells.columns import Labels, Names, Values, Vectors, concatenate, n_cells, take
from service.errors import InvalidOption
from service.inference import TASKS
from service.inference.annotate import UNKNOWN
from service.inference.model import Model
from service.inference.reconstruct import ReconstructOptions
from tests.builders import CLASSES, counts


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_cell_does_not_depend_on_others(tiny: Model, task) -> None:
    """Each cell alone has the bits that it has among others, in every column."""
    matrix = counts(30)
    together = task.run(tiny, matrix, task.options())
    alone = concatenate([task.run(tiny, matrix[row], task.options()) for row in range(30)])

    assert n_cells(together) == 30
    for name, column in together.items():
        one, other = (getattr(c, "codes", getattr(c, "values", None)) for c in (column, alone[name]))
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_an_empty_cell(tiny: Model, task) -> None:
    """A cell without counts is flagged, and nothing in its answer is not finite."""
    columns = task.run(
        tiny, sp.vstack([counts(1), sp.csr_matrix((1, 40), dtype=np.float32)], format="csr"), task.options()
    )

    assert columns["is_empty"].values.tolist() == [False, True]
    for column in columns.values():
        assert isinstance(column, Labels | Names) or np.isfinite(column.values).all()


def test_embed(tiny: Model) -> None:
    """The latent is the encoder's."""
    latent = TASKS["embed"].run(tiny, counts(3), TASKS["embed"].options())["latent"]

    assert isinstance(latent, Vectors)
    assert latent.values.tobytes() == tiny.encode(counts(3)).tobytes()


def test_annotate(tiny: Model) -> None:
    """The label is the most probable class and the confidence its probability; an empty cell is Unknown with 0."""
    matrix = sp.vstack([counts(5), sp.csr_matrix((1, 40), dtype=np.float32)], format="csr")
    columns = TASKS["annotate"].run(tiny, matrix, TASKS["annotate"].options())
    labels, score, probabilities = columns["predicted_labels"], columns["conf_score"], columns["probabilities"]

    assert isinstance(labels, Labels)
    assert isinstance(score, Values)
    assert probabilities.names == CLASSES
    for row in range(5):
        best = int(probabilities.values[row].argmax())
        assert labels.words[labels.codes[row]] == CLASSES[best]
        assert score.values[row] == probabilities.values[row, best]
    assert (labels.words[labels.codes[5]], score.values[5]) == (UNKNOWN, 0)
    assert score.values.dtype == np.float32


def test_reconstruct_named_genes(tiny: Model) -> None:
    """Named genes are columns of the whole, by id, symbol or alias, in the order asked for."""
    whole = TASKS["reconstruct"].run(tiny, counts(3), ReconstructOptions())["expression"]
    some = TASKS["reconstruct"].run(tiny, counts(3), ReconstructOptions(genes="G5, OLD1,ENSG00000000002"))["expression"]

    assert some.names == ("G5", "G1", "G2")
    assert some.values.tobytes() == np.ascontiguousarray(whole.values[:, [5, 1, 2]]).tobytes()


def test_reconstruct_library_size(tiny: Model) -> None:
    """Expression adds up to the cell's own counts, or to the library size that was asked for."""
    matrix = counts(3)
    own = TASKS["reconstruct"].run(tiny, matrix, ReconstructOptions())["expression"]
    asked = TASKS["reconstruct"].run(tiny, matrix, ReconstructOptions(library_size=1e4))["expression"]

    np.testing.assert_allclose(own.values.sum(axis=1), np.asarray(matrix.sum(axis=1)).ravel(), rtol=1e-5)
    np.testing.assert_allclose(asked.values.sum(axis=1), 1e4, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "name", "found"),
    [
        ({"genes": "G1,NOPE"}, "genes", "NOPE"),
        ({"genes": "G1,G1"}, "genes", "once"),
        ({"genes": " , "}, "genes", "at least one"),
        ({"batch": "three"}, "batch", "one, two"),
    ],
)
def test_reconstruct_options_that_cannot_be(tiny: Model, options: dict[str, str], name: str, found: str) -> None:
    """Genes and batches that the model lacks are refused by name, with what there is."""
    with pytest.raises(InvalidOption, match=found) as refused:
        ReconstructOptions(**options).check(tiny)

    assert refused.value.name == name


def test_take_and_concatenate() -> None:
    """Taking columns apart and putting them together gives them back."""
    columns = {
        "a": Values(np.arange(5, dtype=np.float32)),
        "b": Vectors(np.ones((5, 2), np.float32), ("x", "y")),
        "c": Labels(np.array([0, 1, 0, 1, 1], np.int32), ("no", "yes")),
    }
    again = concatenate([take(columns, 0, 2), take(columns, 2, 5)])

    assert again["c"].words == ("no", "yes")
    assert again["b"].names == ("x", "y")
    assert again["a"].values.tolist() == columns["a"].values.tolist()
    assert again["c"].codes.tolist() == columns["c"].codes.tolist()
