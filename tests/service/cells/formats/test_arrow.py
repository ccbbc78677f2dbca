"""Arrow bodies and answers."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from service.cells.columns import Labels, Values, Vectors
from service.cells.formats.arrow import COUNT_TYPES, GENE_TYPES, ArrowWriter, read
from service.errors import BodyTooLarge, InvalidCells, MalformedBody, NoCells
from tests.builders import arrow_body, counts, gene_table

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
    assert table["label"].to_pylist() == ["yés", "no", "yés", "yés", "no"] * 2
    table.validate(full=True)


def test_an_answer_without_its_end() -> None:
    """Without the end-of-stream marker an answer is shorter than a whole one by just that."""
    writer = ArrowWriter()
    content = writer.start({}) + writer.write({"a": Values(np.ones(2, np.float32))}, None)
    assert not content.endswith(b"\xff\xff\xff\xff\0\0\0\0")
    assert writer.end() == b"\xff\xff\xff\xff\0\0\0\0"
