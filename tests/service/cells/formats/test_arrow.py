"""Arrow bodies and answers."""

import contextlib
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.columns import LabelLists, Labels, Values, Vectors
from service.cells.formats.arrow import COUNT_TYPES, GENE_TYPES, ArrowWriter, read
from service.cells.formats.json import read as read_json
from service.errors import BodyTooLarge, CellserveError, InvalidCells, MalformedBody, NoCells
from tests.builders import arrow_body, counts, gene_table, json_body

GENES = gene_table().gene_symbol
LIMIT = 2**26


def stream(columns: dict[str, pa.Array], metadata: dict[str, str] | None = None) -> bytes:
    """A stream of one batch of any columns."""
    batch = pa.record_batch(columns).replace_schema_metadata(
        {"genes": '["A", "B", "C"]'} if metadata is None else metadata
    )
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def lists(values: list[list[int]], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


GENE, COUNT = lists([[0, 2], [1]], pa.int32()), lists([[5, 6], [7]], pa.uint16())


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("rows_per_batch", [1, 7, 1000])
def test_round_trip(compression: str | None, rows_per_batch: int) -> None:
    """Cells come back however the stream is cut and compressed, with their ids."""
    matrix, ids = counts(30), tuple(f"é{number}" for number in range(30))
    cells = read(arrow_body(matrix, GENES, ids, rows_per_batch, compression), LIMIT)

    np.testing.assert_array_equal(cells.counts.toarray(), matrix.toarray())
    assert (cells.genes, cells.cell_ids) == (GENES, ids)


@pytest.mark.parametrize("count_type", COUNT_TYPES, ids=str)
def test_count_types(count_type: pa.DataType) -> None:
    """Every documented type of counts gives the same counts."""
    np.testing.assert_array_equal(
        read(arrow_body(counts(5), GENES, count_type=count_type), LIMIT).counts.toarray(), counts(5).toarray()
    )


@pytest.mark.parametrize("gene_type", GENE_TYPES, ids=str)
def test_gene_types(gene_type: pa.DataType) -> None:
    """Every documented type of indices is understood."""
    body = stream({"gene": lists([[0, 2], [1]], gene_type), "count": COUNT})
    assert read(body, LIMIT).counts.toarray().tolist() == [[5, 0, 6], [0, 7, 0]]


def test_a_slice_of_a_larger_array() -> None:
    """Offsets that do not begin at zero are read as what they are."""
    gene, count = lists([[1], [0, 2], [1], []], pa.int32()), lists([[9], [5, 6], [7], []], pa.uint16())
    body = stream({"gene": gene.slice(1), "count": count.slice(1)})
    assert read(body, LIMIT).counts.toarray().tolist() == [[5, 0, 6], [0, 7, 0], [0, 0, 0]]


def test_cells_without_counts() -> None:
    """Empty lists are cells without counts."""
    body = stream({"gene": lists([[], []], pa.int32()), "count": lists([[], []], pa.uint16())})
    assert read(body, LIMIT).counts.toarray().tolist() == [[0, 0, 0], [0, 0, 0]]


def test_cut_anywhere() -> None:
    """A stream that is cut off at any byte is refused; none is taken for a shorter whole one."""
    whole = arrow_body(counts(6), GENES[:40], rows_per_batch=2)
    for end in range(len(whole)):
        with pytest.raises(MalformedBody):
            read(whole[:end], LIMIT)


def test_cut_between_batches() -> None:
    """A connection that broke between two batches is said to have, with the cells that came whole."""
    whole = arrow_body(counts(6), GENES, rows_per_batch=2)
    with pytest.raises(MalformedBody, match="6 cells arrived whole, but not its end-of-stream"):
        read(whole[:-8], LIMIT)


@pytest.mark.parametrize(
    "content", [b"x", b"\x00" * 64, b"\xff" * 64, b"PAR1" * 8, b"ARROW1\0\0" * 4, b"\xff\xff\xff\xff\xff\xff\xff\x7f"]
)
def test_what_is_no_arrow(content: bytes) -> None:
    """Other bytes are refused, and lengths that they declare are not allocated."""
    with pytest.raises(MalformedBody):
        read(content, LIMIT)


def test_flipped_bytes_do_not_crash() -> None:
    """A flipped byte gives cells or a refusal, in a process that lives on: never a crash or another error."""
    code = """
import sys; sys.path.insert(0, '.')
from service.cells.formats.arrow import read
from service.errors import CellserveError
from tests.builders import arrow_body, counts, gene_table
whole = bytearray(arrow_body(counts(4), gene_table().gene_symbol, compression=sys.argv[1] or None))
for position in range(len(whole)):
    for bit in (1, 16, 128):
        whole[position] ^= bit
        try:
            read(bytes(whole), 2**26)
        except CellserveError:
            pass
        whole[position] ^= bit
"""
    for compression in ("", "zstd"):
        done = subprocess.run([sys.executable, "-c", code, compression], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("columns", "metadata", "found"),
    [
        ({"gene": GENE, "count": COUNT}, {}, "lack 'genes'"),
        ({"gene": GENE, "count": COUNT}, {"genes": "A,B"}, "not a JSON list"),
        ({"gene": GENE, "count": COUNT}, {"genes": "[]"}, "not empty"),
        ({"gene": GENE}, None, "'count' is missing"),
        ({"count": COUNT}, None, "'gene' is missing"),
        ({"gene": GENE, "count": COUNT, "note": COUNT}, None, "Unknown column 'note'"),
        (
            {"gene": GENE, "count": pa.array([["5", "6"], ["7"]], pa.list_(pa.string()))},
            None,
            "must be of type list<uint8",
        ),
        ({"gene": GENE, "count": pa.array([[5, 6], [7]], pa.large_list(pa.uint16()))}, None, "not large_list"),
        (
            {"gene": GENE, "count": lists([[5], [7]], pa.uint16())},
            None,
            "Cell 0 has another number of genes than of counts",
        ),
        (
            {"gene": lists([[0, 3], [1]], pa.int32()), "count": COUNT},
            None,
            "Cell 0 has gene index 3, but 'genes' has 3",
        ),
        ({"gene": lists([[0, 1], [-1]], pa.int32()), "count": COUNT}, None, "Cell 1 has gene index -1"),
        ({"gene": lists([[0, None], [1]], pa.int32()), "count": COUNT}, None, "is null"),
        ({"gene": lists([[0, 2], None], pa.int32()), "count": lists([[5, 6], None], pa.uint16())}, None, "is null"),
        ({"gene": GENE, "count": COUNT, "cell_id": pa.array([1, 2])}, None, "'cell_id' must be of type string"),
        ({"gene": GENE, "count": COUNT, "cell_id": pa.array(["a", None])}, None, "without nulls"),
    ],
)
def test_what_is_not_the_documented_table(
    columns: dict[str, pa.Array], metadata: dict[str, str] | None, found: str
) -> None:
    """Each way of not being cells is said, with column, type or cell."""
    with pytest.raises(InvalidCells, match=found):
        read(stream(columns, metadata), LIMIT)


def test_no_rows() -> None:
    """A stream without rows holds no cells."""
    with pytest.raises(NoCells):
        read(arrow_body(counts(3)[:0], GENES), LIMIT)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_bomb(compression: str) -> None:
    """A small body that would decompress to more than the limit is refused before it does."""
    n_values = 2**25
    lists_ = {
        "gene": pa.ListArray.from_arrays(pa.array([0, n_values], pa.int32()), pa.array(np.zeros(n_values, np.int32))),
        "count": pa.ListArray.from_arrays(pa.array([0, n_values], pa.int32()), pa.array(np.zeros(n_values, np.uint16))),
    }
    batch = pa.record_batch(lists_).replace_schema_metadata({"genes": '["A"]'})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    assert len(sink.getvalue()) < n_values / 30
    before = pa.total_allocated_bytes()
    with pytest.raises(BodyTooLarge):
        read(sink.getvalue(), 2**20)
    assert pa.total_allocated_bytes() - before < 2**20


def test_answers() -> None:
    """Every column comes back bit for bit, with names in the metadata and the head in the schema."""
    random = np.random.default_rng(0)
    columns = {
        "latent": Vectors(random.standard_normal((5, 3)).astype(np.float32)),
        "probabilities": Vectors(random.random((5, 2)).astype(np.float32), ("no", "yes")),
        "score": Values(random.random(5).astype(np.float32)),
        "flag": Values(np.array([True, False, True, True, False])),
        "label": Labels(np.array([1, 0, 1, 1, 0], np.int32), ("no", "yés")),
        "near": LabelLists(np.array([[2, 0], [2, 2], [0, 2], [2, 0], [0, 0]], np.int32), ("é", "nobody's", "b")),
    }
    writer = ArrowWriter()
    content = (
        writer.start({"model": "m"})
        + writer.write(columns, ("a", "b", "c", "d", "é"))
        + writer.write(columns, ("f",) * 5)
    )
    table = pa.ipc.open_stream(content + writer.end()).read_all()

    assert json.loads(table.schema.metadata[b"cellserve"]) == {"model": "m"}
    assert json.loads(table.schema.field("probabilities").metadata[b"names"]) == ["no", "yes"]
    assert table["cell_id"].to_pylist() == ["a", "b", "c", "d", "é", *"fffff"]
    assert table["latent"].chunk(0).flatten().to_numpy().tobytes() == columns["latent"].values.tobytes()
    assert table["score"].chunk(1).to_numpy().tobytes() == columns["score"].values.tobytes()
    assert table["flag"].to_pylist() == columns["flag"].values.tolist() * 2
    assert table["near"].to_pylist() == [["b", "é"], ["b", "b"], ["é", "b"], ["b", "é"], ["é", "é"]] * 2
    assert b"nobody's" not in content
    assert table["label"].to_pylist() == ["yés", "no", "yés", "yés", "no"] * 2
    table.validate(full=True)


def test_an_answer_without_its_end() -> None:
    """Without the end-of-stream marker an answer is shorter than a whole one by just that."""
    writer = ArrowWriter()
    content = writer.start({}) + writer.write({"a": Values(np.ones(2, np.float32))}, None)
    assert not content.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    assert writer.end() == b"\xff\xff\xff\xff\0\0\0\0"


def test_arrow_is_json() -> None:
    """The same cells as Arrow and as JSON are the same numbers, type for type of Arrow."""
    matrix = counts(12)
    reference = read_json(json_body(matrix, GENES), 0).counts.toarray()
    for count_type in COUNT_TYPES:
        found = read(arrow_body(matrix, GENES, count_type=count_type, compression="zstd"), LIMIT)
        assert found.counts.toarray().astype(np.float64).tobytes() == reference.tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_of_any_batches(data: st.DataObject) -> None:
    """Slices of arrays, cut into batches in any way, with empty cells and empty batches, are the cells that they show."""
    row = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=4)
    rows = data.draw(st.lists(row, min_size=1, max_size=8))
    columns = {
        "gene": lists([[gene for gene, _ in cell] for cell in rows], data.draw(st.sampled_from(GENE_TYPES))),
        "count": lists([[count for _, count in cell] for cell in rows], data.draw(st.sampled_from(COUNT_TYPES))),
    }
    batch = pa.record_batch(columns).replace_schema_metadata({"genes": '["A", "B", "C"]'})
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    start, stop = cuts[0] if cuts else 0, len(rows)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for first, last in zip([start, *cuts], [*cuts, stop], strict=True):
            writer.write_batch(batch.slice(first, last - first))
    expected = np.zeros((stop - start, 3))
    for cell, pairs in enumerate(rows[start:]):
        for gene, count in pairs:
            expected[cell, gene] += count
    if start == stop:
        with pytest.raises(NoCells):
            read(sink.getvalue(), LIMIT)
    else:
        np.testing.assert_array_equal(read(sink.getvalue(), LIMIT).counts.toarray(), expected)


def test_cut_anywhere_whatever_the_values() -> None:
    """A stream whose own bytes look like an end of stream is refused all the same when it is cut off there."""
    batch = pa.record_batch({"gene": GENE, "count": COUNT, "batch": pa.array([-1, 0], pa.int32())})
    batch = batch.replace_schema_metadata({"genes": '["A", "B", "C"]'})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    whole = sink.getvalue()
    assert len(read(whole, LIMIT)) == 4
    for end in range(len(whole)):
        with pytest.raises(MalformedBody):
            read(whole[:end], LIMIT)


@pytest.mark.parametrize("count", [1, 2])
def test_streams_one_after_the_other(count: int) -> None:
    """Two whole streams joined, or bytes after the end: refused, for a reader that stops at the first end loses cells."""
    whole = arrow_body(counts(3), GENES)
    for more in (whole * count, b"x", whole[-8:], whole[-4:], whole[:-8], bytes(8)):
        with pytest.raises(MalformedBody):
            read(whole + more, LIMIT)


def test_a_column_twice() -> None:
    """Of two columns of one name none is taken."""
    batch = pa.record_batch([GENE, COUNT, COUNT], names=["gene", "count", "count"])
    sink = io.BytesIO()
    schema = batch.schema.with_metadata({"genes": '["A", "B", "C"]'})
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    with pytest.raises(InvalidCells, match="occurs twice"):
        read(sink.getvalue(), LIMIT)


@pytest.mark.parametrize(
    "kind",
    [
        pa.int32(),
        pa.string(),
        pa.large_list(pa.int32()),
        pa.list_view(pa.int32()),
        pa.list_(pa.int32(), 2),
        pa.list_(pa.list_(pa.int32())),
        pa.list_(pa.int8()),
        pa.list_(pa.uint64()),
        pa.list_(pa.float16()),
        pa.list_(pa.float32()),
        pa.list_(pa.bool_()),
        pa.list_(pa.decimal128(5)),
        pa.list_(pa.dictionary(pa.int8(), pa.int32())),
        pa.struct([("a", pa.int32())]),
        pa.map_(pa.int32(), pa.int32()),
        pa.null(),
    ],
    ids=str,
)
def test_other_types_of_genes(kind: pa.DataType) -> None:
    """Types that are not documented are refused, and the types that are wanted are named."""
    gene = pa.nulls(2, kind)
    with pytest.raises(InvalidCells, match=r"Column 'gene' must be of type list<int32\|int64\|uint16\|uint32>, not "):
        read(stream({"gene": gene, "count": COUNT}), LIMIT)


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.float16(), pa.bool_(), pa.string(), pa.duration("s")], ids=str
)
def test_other_types_of_counts(kind: pa.DataType) -> None:
    """Counts of a type that cannot hold counts, or not exactly, are refused."""
    with pytest.raises(InvalidCells, match=r"Column 'count' must be of type list<uint8\|"):
        read(stream({"gene": GENE, "count": pa.nulls(2, pa.list_(kind))}), LIMIT)


@pytest.mark.parametrize("gene_type", GENE_TYPES, ids=str)
def test_indices_beyond_the_genes(gene_type: pa.DataType) -> None:
    """The first index past the list and the largest of the type are refused with their cell, also in a later batch."""
    largest = 2 ** (gene_type.bit_width - str(gene_type).startswith("int")) - 1
    for index in (3, largest):
        gene = lists([[0, 2], [], [1], [index]], gene_type)
        batch = pa.record_batch({"gene": gene, "count": lists([[5, 6], [], [7], [8]], pa.uint16())})
        batch = batch.replace_schema_metadata({"genes": '["A", "B", "C"]'})
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch.slice(0, 1))
            writer.write_batch(batch.slice(1, 3))
        with pytest.raises(InvalidCells, match=f"Cell 3 has gene index {index}, but 'genes' has 3 names"):
            read(sink.getvalue(), LIMIT)


def test_a_gene_twice_within_a_cell() -> None:
    """A repeated index is kept for alignment to sum."""
    body = stream({"gene": lists([[1, 1]], pa.int32()), "count": lists([[5, 6]], pa.uint16())})
    assert read(body, LIMIT).counts.toarray().tolist() == [[0, 11, 0]]


def test_a_batch_column_of_any_type_is_ignored() -> None:
    """`batch` is read over, whatever it holds."""
    for column in (pa.array(["a", None]), pa.array([1, 2]), pa.nulls(2), pa.array(["a", "a"]).dictionary_encode()):
        assert len(read(stream({"gene": GENE, "count": COUNT, "batch": column}), LIMIT)) == 2


@pytest.mark.parametrize("cell_id", ["a\x1b[31m", "a\n", "", "n" * 257])
def test_cell_ids_are_names(cell_id: str) -> None:
    """Ids that JSON would refuse are refused here: they come back in answers and in messages."""
    with pytest.raises(InvalidCells, match="cell_id"):
        read(arrow_body(counts(2), GENES, ("a", cell_id)), LIMIT)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_types_of_cell_ids(kind: pa.DataType) -> None:
    """Both kinds of strings are ids."""
    body = stream({"gene": GENE, "count": COUNT, "cell_id": pa.array(["x", "γ"], kind)})
    assert read(body, LIMIT).cell_ids == ("x", "γ")


def test_cell_ids_that_are_no_text() -> None:
    """Bytes that are not UTF-8 where text is declared are refused."""
    body = bytearray(stream({"gene": GENE, "count": COUNT, "cell_id": pa.array(["gleich", "danach"])}))
    body[body.index(b"gleich")] = 0xFF
    with pytest.raises(MalformedBody):
        read(bytes(body), LIMIT)


@pytest.mark.parametrize("offsets", [[0, 2, 1], [0, -1, 3], [-2, 0, 3], [0, 2, 2**30], [2, 3, 3 + 2**20], [3, 2, 1]])
def test_offsets_that_lead_astray(offsets: list[int]) -> None:
    """Offsets that fall, are negative or pass the end are refused before a value is looked at."""
    right = np.array([0, 2, 3], np.int32).tobytes()
    body = stream({"gene": GENE, "count": COUNT})
    assert body.count(right) == 2
    for column in (0, 1):
        at = body.index(right, body.index(right) + column)
        wrong = body[:at] + np.array(offsets, np.int32).tobytes() + body[at + 12 :]
        with pytest.raises((MalformedBody, InvalidCells)):
            read(wrong, LIMIT)


def test_a_type_that_carries_code(tmp_path: Path) -> None:
    """Extension types that say how to be unpickled are not unpickled."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Payload())}
    fields = [pa.field("gene", GENE.type), pa.field("count", COUNT.type), pa.field("batch", pa.int32(), metadata=marks)]
    schema = pa.schema(fields, metadata={"genes": '["A", "B", "C"]'})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([GENE, COUNT, pa.array([0, 1], pa.int32())], schema=schema))
    with contextlib.suppress(CellserveError, Warning):  # pyarrow may warn that it does not unpickle
        read(sink.getvalue(), LIMIT)
    assert not (tmp_path / "ran").exists()


def test_other_forms_of_arrow() -> None:
    """A file in place of a stream, and the stream of before 1.0, are refused and not half read."""
    batch = pa.record_batch({"gene": GENE, "count": COUNT}).replace_schema_metadata({"genes": '["A", "B", "C"]'})
    file, legacy = io.BytesIO(), io.BytesIO()
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    with pa.ipc.new_stream(legacy, batch.schema, options=pa.ipc.IpcWriteOptions(use_legacy_format=True)) as writer:
        writer.write_batch(batch)
    for body in (file.getvalue(), legacy.getvalue()):
        with pytest.raises(MalformedBody):
            read(body, LIMIT)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_cut_anywhere_when_compressed(compression: str) -> None:
    """A compressed stream that is cut off at any byte is refused."""
    whole = arrow_body(counts(4), GENES, ("a", "b", "c", "d"), rows_per_batch=2, compression=compression)
    for end in range(len(whole)):
        with pytest.raises(MalformedBody):
            read(whole[:end], LIMIT)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=9))
def test_answers_hold_every_bit(values: list[float]) -> None:
    """Every float32, NaN and the infinities among them, comes back bit for bit, in vectors of any layout."""
    array = np.array(values, np.float32)
    columns = {"s": Values(array), "v": Vectors(np.asfortranarray(np.stack([array, array[::-1]], axis=1)))}
    writer = ArrowWriter()
    table = pa.ipc.open_stream(writer.start({}) + writer.write(columns, None) + writer.end()).read_all()

    assert table["s"].chunk(0).to_numpy().tobytes() == array.tobytes()
    assert table["v"].chunk(0).flatten().to_numpy().tobytes() == columns["v"].values.tobytes()


def test_an_answer_cut_anywhere() -> None:
    """Readers of a cut answer find an error or an end that is missing, never the whole."""
    columns = {"label": Labels(np.array([1, 0], np.int32), ("no", "yes")), "score": Values(np.ones(2, np.float32))}
    writer = ArrowWriter()
    whole = (
        writer.start({"m": 1}) + writer.write(columns, ("a", "b")) + writer.write(columns, ("c", "d")) + writer.end()
    )
    assert pa.ipc.open_stream(whole).read_all().num_rows == 4
    for end in range(len(whole) - 8):
        try:
            n_rows = pa.ipc.open_stream(whole[:end]).read_all().num_rows
        except (pa.ArrowException, OSError, EOFError):
            continue
        assert n_rows < 4 or not whole[:end].endswith(b"\xff\xff\xff\xff\0\0\0\0")
