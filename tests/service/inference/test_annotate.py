"""annotate: levels that agree, sets that hold what they promise, cells that are not of the reference, and models that lack all that."""

import io
import json
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.columns import Columns, LabelLists, Labels, concatenate
from service.cells.formats.tensors import describe, write
from service.client import fill, read_answer
from service.contract import artifact
from service.errors import InvalidArtifact, InvalidOption
from service.inference import TASKS
from service.inference.annotate import UNKNOWN, AnnotateOptions, run
from service.inference.conformal import group_scores, others
from service.inference.model import Model, load
from service.inference.session import Runtime
from tests.builders import (
    CLASSES,
    N_GENES,
    PARENTS,
    SUBTYPES,
    THRESHOLD,
    arrow_body,
    counts,
    gene_table,
    json_body,
    parts,
)
from tests.conftest import serving

TASK = TASKS["annotate"]
EMPTY = sp.csr_matrix((1, N_GENES), dtype=np.float32)
EVERYTHING = AnnotateOptions(top_k=2, coverage=0.9)


def words(columns: Columns, name: str) -> list[str]:
    column = columns[name]
    assert isinstance(column, Labels)
    return [column.words[code] for code in column.codes]


def test_a_cell_does_not_depend_on_others(calibrated: Model) -> None:
    """With every option on, each cell alone has the bits that it has among 100 others."""
    matrix = counts(100)
    together = run(calibrated, matrix, EVERYTHING)
    alone = concatenate([run(calibrated, matrix[row], EVERYTHING) for row in range(100)])
    assert {"prediction_set", "top_labels", "top_scores", "mapping_score", "prediction_set_cell_subtype"} <= set(
        together
    )
    for name, column in together.items():
        one, other = (getattr(c, "codes", getattr(c, "values", None)) for c in (column, alone[name]))
        assert one.tobytes() == other.tobytes(), name


def test_children_agree_with_their_parents(calibrated: Model) -> None:
    """Their probabilities add up to the parent's, and a finer label is always below the broader one."""
    found = run(calibrated, counts(200), AnnotateOptions(unknown_threshold=0))
    broad, fine = found["probabilities"].values, found["probabilities_cell_subtype"].values
    for code, name in enumerate(CLASSES):
        children = [i for i, parent in enumerate(PARENTS) if parent == name]
        np.testing.assert_allclose(fine[:, children].sum(axis=1), broad[:, code], rtol=1e-6)
    above = [PARENTS[SUBTYPES.index(label)] for label in words(found, "predicted_labels_cell_subtype")]
    assert above == words(found, "predicted_labels")
    # The most probable subtype of all is sometimes below another class: B is not divided, NK is.
    assert (np.array(SUBTYPES)[fine.argmax(axis=1)] != words(found, "predicted_labels_cell_subtype")).any()


def test_cells_below_the_threshold_are_unknown(calibrated: Model) -> None:
    """On every level; their confidence and probabilities stay; 0 turns it off, 1 calls all Unknown."""
    found = run(calibrated, counts(200), AnnotateOptions())
    score = found["mapping_score"].values
    is_unknown = np.array(words(found, "predicted_labels")) == UNKNOWN
    assert (is_unknown == (score < THRESHOLD)).all()
    assert 0 < is_unknown.sum() < 200
    assert (is_unknown == (np.array(words(found, "predicted_labels_cell_subtype")) == UNKNOWN)).all()
    assert (found["conf_score"].values == found["probabilities"].values.max(axis=1)).all()
    off = run(calibrated, counts(200), AnnotateOptions(unknown_threshold=0))
    assert UNKNOWN not in words(off, "predicted_labels")
    assert off["mapping_score"].values.tobytes() == score.tobytes()
    assert set(words(run(calibrated, counts(200), AnnotateOptions(unknown_threshold=1)), "predicted_labels")) == {
        UNKNOWN
    }


def test_an_empty_cell(calibrated: Model) -> None:
    """It is Unknown whatever the threshold, fits nowhere, and no class is excluded."""
    found = run(calibrated, EMPTY, AnnotateOptions(coverage=0.5, unknown_threshold=0))
    assert words(found, "predicted_labels") == [UNKNOWN]
    assert found["conf_score"].values[0] == found["mapping_score"].values[0] == 0
    assert found["prediction_set"].lists() == [list(CLASSES)]


def test_top_classes(calibrated: Model) -> None:
    """As many as asked for, or as there are, the most probable first."""
    found = run(calibrated, counts(5), AnnotateOptions(top_k=4))
    p = found["probabilities_cell_subtype"].values
    order = np.argsort(-p, axis=1, kind="stable")[:, :4]
    assert found["top_labels_cell_subtype"].lists() == [[SUBTYPES[i] for i in row] for row in order]
    assert found["top_scores_cell_subtype"].values.tobytes() == np.take_along_axis(p, order, axis=1).tobytes()
    assert [len(one) for one in found["top_labels"].lists()] == [3] * 5


def test_prediction_sets(calibrated: Model) -> None:
    """A class is in the set if the others' probability is at most its quantile; the first is the most probable; more coverage never removes."""
    matrix = counts(50)
    found = {
        c: run(calibrated, matrix, AnnotateOptions(coverage=c))["prediction_set"].lists() for c in (0.5, 0.9, 0.999)
    }
    p = run(calibrated, matrix, AnnotateOptions())["probabilities"].values.astype(np.float64)
    # Of B's own 30 scores the 28th (0.27); of all 40, which T and NK share, the 37th.
    every = np.sort(np.concatenate([np.arange(30) / 100, np.arange(10) / 10]))
    limit = np.array([0.27, every[36], every[36]])
    for row, names in enumerate(found[0.9]):
        assert set(names) == {CLASSES[i] for i in range(3) if p[row].sum() - p[row, i] <= limit[i] + 1e-12}
        assert names == sorted(names, key=lambda name: -p[row, CLASSES.index(name)])
    assert all(set(a) <= set(b) <= set(c) for a, b, c in zip(*found.values(), strict=True))
    # Beyond n / (n + 1) no quantile is high enough to exclude anything.
    assert found[0.999] == [sorted(CLASSES, key=lambda name: -p[row, CLASSES.index(name)]) for row in range(50)]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), coverage=st.sampled_from([0.8, 0.9, 0.95]))
def test_sets_hold_the_true_class_as_often_as_asked(seed: int, coverage: float) -> None:
    """Over exchangeable cells, within five standard errors of what split conformal prediction promises."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(4) / 2, 4000)
    truth = np.array([random.choice(4, p=row) for row in p])
    scores = others(p)[np.arange(4000), truth]
    made = group_scores(scores[:2000], truth[:2000].astype(np.int32), 4, min_class=100)
    found = (scores[2000:] <= made.limits(coverage)[truth[2000:]]).mean()
    assert abs(found - coverage) < 5 * np.sqrt(2 * coverage * (1 - coverage) / 2000)


def test_the_probability_of_the_others_keeps_its_digits() -> None:
    """Where 1 - p would be 0 or noise."""
    p = np.array([[1.0, 3e-12, 1e-30]], dtype=np.float32)
    np.testing.assert_allclose(others(p)[0], [3e-12, 1.0, 1.0], rtol=1e-6)


def test_a_model_without_calibration_answers_as_before(tiny: Model) -> None:
    """No column more; options that it cannot serve are refused with the reason."""
    assert list(run(tiny, counts(2), AnnotateOptions())) == [
        "predicted_labels",
        "conf_score",
        "probabilities",
        "is_empty",
    ]
    assert AnnotateOptions().about(tiny) == {}
    for option in ("coverage", "unknown_threshold"):
        with pytest.raises(InvalidOption, match="was exported without"):
            TASK.read_options({option: "0.5"}, tiny)
    for wrong in ({"coverage": "1"}, {"coverage": "nan"}, {"unknown_threshold": "1.1"}, {"top_k": "0"}):
        with pytest.raises(InvalidOption):
            TASK.read_options(wrong, tiny)


async def test_over_http(calibrated_path: Path, calibrated: Model) -> None:
    """JSON and Arrow hold the same sets, and the head says threshold and coverage."""
    genes = gene_table().gene_id
    matrix = counts(20)
    expected = run(calibrated, matrix, EVERYTHING)
    async with serving(calibrated_path) as client:
        query = {"coverage": "0.9", "top_k": "2"}
        text = (await post(client, json_body(matrix, genes), "application/json", query)).json()
        answer = await post(client, arrow_body(matrix, genes), "application/vnd.apache.arrow.stream", query)
    assert (text["unknown_threshold"], text["coverage"]) == (THRESHOLD, 0.9)
    table = read_answer(answer.content)
    assert json.loads(table.schema.metadata[b"cellserve"])["coverage"] == 0.9
    for name in ("prediction_set", "top_labels", "prediction_set_cell_subtype"):
        column = expected[name]
        assert isinstance(column, LabelLists)
        assert [cell[name] for cell in text["cells"]] == table.column(name).to_pylist() == column.lists()
    assert table.column("mapping_score").to_pylist() == expected["mapping_score"].values.tolist()


async def post(client: httpx.AsyncClient, body: bytes, kind: str, query: dict[str, str]) -> httpx.Response:
    answer = await client.post("/v1/annotate", params=query, content=body, headers={"content-type": kind})
    assert answer.status_code == 200, answer.text
    return answer


def test_the_client_writes_lists_as_words(calibrated: Model) -> None:
    """A column of obs cannot hold lists in a file: their words are joined."""
    ad = pytest.importorskip("anndata")
    from service.cells.formats.arrow import ArrowWriter

    columns = run(calibrated, counts(3), AnnotateOptions(coverage=0.999))
    writer = ArrowWriter()
    head = {"model": {"name": "tiny", "version": "1"}, "task": "annotate"}
    content = writer.start(head) + writer.write(columns, None) + writer.end()
    filled = fill(ad.AnnData(counts(3)), [read_answer(content)], "X")
    assert filled.obs["prediction_set"].tolist() == ["|".join(one) for one in columns["prediction_set"].lists()]


def test_lists_as_tensors() -> None:
    """Shape (cells, most), the empty string where a cell has fewer, as JSON and as bytes."""
    column = LabelLists(np.array([[1, -1], [0, 1], [-1, -1]], dtype=np.int32), ("a", "bé"))
    assert describe(column) == ("BYTES", (3, 2))
    body, _ = write({}, [("set", column, False)])
    assert json.loads(body)["outputs"][0]["data"] == ["bé", "", "a", "bé", "", ""]
    binary, size = write({}, [("set", column, True)])
    assert binary[size:] == b"\x03\0\0\0b\xc3\xa9\0\0\0\0\x01\0\0\0a\x03\0\0\0b\xc3\xa9" + bytes(8)


def test_an_arrow_column_of_lists() -> None:
    """Of words, as many as each cell has."""
    from service.cells.formats.arrow import ArrowWriter

    writer = ArrowWriter()
    column = LabelLists(np.array([[1, -1], [-1, -1]], dtype=np.int32), ("a", "b"), is_ragged=True)
    table = read_answer(writer.start({}) + writer.write({"set": column}, None) + writer.end())
    assert table.schema.field("set").type.value_type == pa.string()
    assert table.column("set").to_pylist() == [["b"], []]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cell_type/scores": np.zeros(39)}, "lacks scores and classes of 40 cells"),
        ({"cell_type/scores": np.full(40, np.nan)}, "finite float64"),
        ({"cell_type/scores": np.zeros(40, np.float32)}, "finite float64"),
        ({"cell_type/classes": np.full(40, 3, np.int32)}, "a class that the manifest does not have"),
        ({"cell_type/classes": np.full(40, -1, np.int32)}, "a class that the manifest does not have"),
    ],
)
def test_a_broken_file_of_scores_is_refused(tmp_path: Path, change: dict[str, np.ndarray], problem: str) -> None:
    """With the level and what was wrong; nothing is served with wrong quantiles."""
    document, contents = parts(is_calibrated=True)
    arrays = dict(np.load(io.BytesIO(contents["reference/conformal.npz"]))) | change
    refused(tmp_path, document, contents, arrays, problem)


def test_pickled_scores_are_refused(tmp_path: Path) -> None:
    """No object array is ever loaded."""
    document, contents = parts(is_calibrated=True)
    arrays = dict(np.load(io.BytesIO(contents["reference/conformal.npz"])))
    refused(tmp_path, document, contents, arrays | {"cell_type/scores": np.array([{}] * 40)}, "not a readable npz")


def refused(tmp_path: Path, document: dict, contents: dict[str, bytes], arrays: dict, problem: str) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    contents["reference/conformal.npz"] = buffer.getvalue()
    document["files"] = {file: entry.model_dump() for file, entry in artifact.describe(contents).items()}
    path = artifact.write(tmp_path, artifact.Manifest.model_validate(document), contents)
    with pytest.raises(InvalidArtifact, match=problem):
        load(artifact.read(path), Runtime())
