"""Bodies and answers that are like earlier ones: the same cells, the same errors and the same bytes as where nothing is known."""

import io
from collections.abc import Iterator

import numpy as np
import orjson
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.columns import Columns, LabelLists, Labels, Values, Vectors, take
from service.cells.formats import arrow, arrow_known
from service.cells.formats.arrow import ArrowWriter, new_bytes, read
from service.cells.formats.arrow_known import MAX_ROWS, N_KNOWN, known_answers, known_bodies
from service.errors import BodyTooLarge, CellserveError
from tests.builders import arrow_body, counts, gene_table

GENES = gene_table().gene_symbol
LIMIT = 2**26


def forget() -> None:
    known_bodies._kept = known_answers._kept = ()


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Each test begins and ends with nothing known."""
    forget()
    yield
    forget()


class ArrowWasAsked(Exception):
    """Arrow read or wrote."""


def refuse(*_: object, **__: object) -> None:
    raise ArrowWasAsked


def outcome(content: bytes, limit: int = LIMIT) -> tuple[object, ...]:
    """What reading gives, in values that can be compared: cells, or the error."""
    try:
        cells = read(content, limit)
    except CellserveError as error:
        return type(error), error.detail
    matrix = cells.counts
    arrays = (matrix.data, matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64))
    return cells.genes, cells.cell_ids, cells.clusters, matrix.shape, *((a.dtype, a.tobytes()) for a in arrays)


@pytest.mark.parametrize("count_type", arrow.COUNT_TYPES, ids=str)
def test_further_bodies_of_a_client(count_type: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second body with a schema on Arrow is not asked, whatever the number of cells and counts; cells are the same."""
    read(arrow_body(counts(3), GENES, count_type=count_type), LIMIT)
    monkeypatch.setattr(pa.ipc, "open_stream", refuse)
    for matrix in (counts(1), counts(70, seed=1), sp.csr_matrix((4, len(GENES)), dtype=np.float32)):
        found = read(arrow_body(matrix, GENES, count_type=count_type), LIMIT)
        np.testing.assert_array_equal(found.counts.toarray(), matrix.toarray())
        assert (found.genes, found.cell_ids) == (GENES, None)


@pytest.mark.parametrize(
    "changes",
    [{"cell_ids": ("a", "b")}, {"rows_per_batch": 1}, {"compression": "lz4"}, {"compression": "zstd"}],
    ids=str,
)
def test_what_is_left_to_arrow(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, several batches and compression are Arrow's to read, also from a client whose plain bodies are known."""
    plain, other = arrow_body(counts(2), GENES), arrow_body(counts(2), GENES, **changes)  # type: ignore[arg-type]
    read(other, LIMIT)
    read(plain, LIMIT)
    np.testing.assert_array_equal(read(other, LIMIT).counts.toarray(), counts(2).toarray())
    monkeypatch.setattr(pa.ipc, "open_stream", refuse)
    with pytest.raises(ArrowWasAsked):
        read(other, LIMIT)


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_damage(data: st.DataObject) -> None:
    """A body with changed, missing or additional bytes gives what it gives where nothing is known: the same error, or the same cells."""
    damaged = bytearray(arrow_body(counts(data.draw(st.integers(1, 3))), GENES, count_type=pa.uint16()))
    first = len(damaged) - 900  # most of what is before are the names of genes
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(max(0, first), len(damaged) - 1) | st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.sampled_from((0, 1, 2, 4, 8, 127, 128, 255)) | st.integers(0, 255))
    content = bytes(damaged[: data.draw(st.sampled_from((None, -1, -8, -16)))]) + data.draw(
        st.sampled_from((b"", b"\0" * 8))
    )
    forget()
    unknown = outcome(content)
    forget()
    read(arrow_body(counts(5, seed=1), GENES, count_type=pa.uint16()), LIMIT)
    assert outcome(content) == unknown


@pytest.mark.parametrize("place", ["body_length", "n_rows", "nodes", "buffers"])
def test_numbers_that_break_a_promise(place: str) -> None:
    """Each number of a header, taken for every other one that matters, gives what it gives where nothing is known."""
    whole = arrow_body(counts(3), GENES)
    read(whole, LIMIT)
    (known,) = known_bodies._kept
    start = len(known.prefix) + getattr(known.numbers, place)
    n_numbers = {"nodes": 8, "buffers": 16}.get(place, 1)
    for number in range(n_numbers):
        at = start + 8 * number
        now = int.from_bytes(whole[at : at + 8], "little", signed=True)
        for value in (-1, 0, 1, now - 8, now - 1, now + 1, now + 4, now + 8, 2**31, 2**62, -(2**63)):
            content = whole[:at] + value.to_bytes(8, "little", signed=True) + whole[at + 8 :]
            known_bodies._kept = (known,)
            found = outcome(content)
            forget()
            assert found == outcome(content), (number, now, value)


def test_the_limit_of_decoded_bytes() -> None:
    """A known body is refused where it is too large, like any other."""
    content = arrow_body(counts(50), GENES)
    read(content, LIMIT)
    assert outcome(content, 100)[0] is BodyTooLarge


def test_new_bytes() -> None:
    """Of a body whose schema is known only the rest counts: the header of the batch, the counts, the end."""
    content = arrow_body(counts(1), GENES)
    assert new_bytes(content) == len(content)
    read(content, LIMIT)
    (known,) = known_bodies._kept
    assert new_bytes(content) == len(content) - len(known.prefix)
    assert GENES[-1].encode() in known.prefix
    assert new_bytes(content[:50]) == 50


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last few schemas are known, and none that is very long."""
    for number in range(N_KNOWN + 4):
        read(arrow_body(counts(1), (f"first{number}", *GENES[1:])), LIMIT)
    assert [known.genes[0] for known in known_bodies._kept] == [f"first{n}" for n in range(N_KNOWN + 3, 3, -1)]
    forget()
    monkeypatch.setattr(arrow_known, "MAX_SCHEMA_BYTES", 100)
    read(arrow_body(counts(1), GENES), LIMIT)
    assert not known_bodies._kept


def columns(n_cells: int, seed: int = 0) -> Columns:
    """One of each kind that has a fixed width."""
    random = np.random.default_rng(seed)
    return {
        "latent": Vectors(random.random((n_cells, 3), np.float32)),
        "probabilities": Vectors(random.random((n_cells, 2), np.float32), ("B", "naïve T")),
        "is_empty": Values(random.random(n_cells) < 0.5),
        "mapping_score": Values(random.random(n_cells).astype(np.float32)),
        "predicted_labels": Labels(random.integers(0, 2, n_cells, np.int32), ("B", "naïve T")),
    }


def written(head: dict[str, object], *parts: Columns, fails: bool = False) -> bytes:
    writer = ArrowWriter()
    content = writer.start(head) + b"".join(writer.write(part, None) for part in parts)
    return content + (writer.fail(b"{}") if fails else writer.end())


@pytest.mark.parametrize("n_cells", [1, 2, 9, MAX_ROWS])
def test_further_answers(n_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second answer of a kind has the bytes that Arrow gives it, without asking Arrow."""
    heads = [{"request_id": f"{number:032x}", "n_cells": n_cells} for number in (7, 2**100)]
    expected = []
    for seed, head in enumerate(heads):
        expected.append(written(head, columns(n_cells, seed)))
        forget()
    assert written(heads[0], columns(n_cells, 0)) == expected[0]
    monkeypatch.setattr(pa.ipc, "new_stream", refuse)
    assert written(heads[1], columns(n_cells, 1)) == expected[1]
    with pa.ipc.open_stream(expected[1]) as reader:
        assert orjson.loads(reader.schema.metadata[b"cellserve"]) == heads[1]


def test_answers_that_are_not_like_it() -> None:
    """Another number of cells, head, column or word is another kind; words of which each cell has several are Arrow's."""
    head = {"request_id": "0" * 32}
    one, two = columns(1), columns(2)
    ragged = {"top_labels": LabelLists(np.zeros((1, 2), np.int32), ("B", "T"))}
    renamed = {**one, "predicted_labels": Labels(np.zeros(1, np.int32), ("B", "CD4 T"))}
    kinds = [
        one,
        two,
        {"latent": one["latent"]},
        ragged,
        renamed,
        {**one, "latent": Vectors(np.ones((1, 4), np.float32))},
    ]
    expected = []
    for kind in kinds:
        forget()
        expected.append(written(head, kind))
    forget()
    for _ in range(2):
        assert [written(head, kind) for kind in kinds] == expected
    assert written({"request_id": "0" * 31}, one) != expected[0]
    assert len(known_answers._kept) == len(kinds)  # all but the ragged one, and one for the shorter head


@pytest.mark.parametrize("fails", [False, True])
def test_more_cells_after_a_known_beginning(fails: bool) -> None:
    """An answer whose first cells were written like another's goes on as Arrow would have written all of it, also where it breaks off."""
    head, all_columns = {"request_id": "1" * 32}, columns(5)
    parts = take(all_columns, 0, 2), take(all_columns, 2, 5)
    expected = written(head, *parts, fails=fails)
    assert known_answers._kept
    found = written(head, *parts, fails=fails)
    assert found == expected
    reader = pa.ipc.open_stream(io.BytesIO(found))
    assert [batch.num_rows for batch in reader] == [2, 3, *([0] if fails else [])]


def test_a_head_that_occurs_twice_is_not_kept() -> None:
    """Where it is not clear what stands where, Arrow writes every answer."""
    writer = ArrowWriter()
    writer.start({})
    writer._head = b"names"
    writer.write({"probabilities": Vectors(np.ones((1, 2), np.float32), ("names", "names"))}, None)
    assert not known_answers._kept
