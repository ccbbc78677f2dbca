"""application/vnd.apache.arrow.stream: Arrow's list layout is CSR, so counts are read where they lie."""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import scipy.sparse as sp

from service.cells.columns import Columns, LabelLists, Labels, Vectors, n_cells
from service.cells.counts import Cells, csr
from service.cells.formats.arrow_known import MAX_ROWS, KnownAnswer, KnownBody, known_answers, known_bodies
from service.cells.formats.arrow_limits import END, check_decoded_size
from service.cells.formats.format import Format, check_names, remembered
from service.contract import strict_json
from service.errors import InvalidCells, MalformedBody, NoCells

GENE_TYPES = (pa.int32(), pa.int64(), pa.uint16(), pa.uint32())
COUNT_TYPES = (pa.uint8(), pa.uint16(), pa.uint32(), pa.int32(), pa.int64(), pa.float32(), pa.float64())
COLUMNS = ("gene", "count", "cell_id", "batch", "cluster")
_NUMPY = {
    kind.id: np.dtype({"float": "float32", "double": "float64"}.get(str(kind), str(kind)))
    for kind in GENE_TYPES + COUNT_TYPES
}
_ARROW = {np.dtype(np.float32): pa.float32(), np.dtype(np.int32): pa.int32()}
_OPTIONS = pa.ipc.IpcWriteOptions()
_BUFFER_BYTES = 2**17
"""Arrow's own; without any it looks for some in the environment, each time."""

GENES_KEY = b"genes"
PROBLEM_KEY = b"cellserve-problem"
"""Of the metadata of a last record batch, where a streamed answer breaks off."""


def read(body: bytes, max_decoded_bytes: int) -> Cells:
    """Cells of an Arrow IPC stream.

    Raises:
        MalformedBody: not an Arrow stream, damaged, or cut off (a stream ends with its end-of-stream marker).
        InvalidCells: Arrow, but not the documented columns; names column, type or cell.
        NoCells: no row in any batch.
        BodyTooLarge: it would decompress to more than `max_decoded_bytes`.
    """
    known = known_bodies.find(body)
    if known is not None and len(body) <= max_decoded_bytes and (counts := known.counts(body)) is not None:
        return Cells(genes=known.genes, counts=counts)
    try:
        is_whole = check_decoded_size(body, max_decoded_bytes)
        with pa.ipc.open_stream(body) as reader:
            schema = reader.schema
            genes = _genes(schema)
            _check_types(schema)
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowException, struct.error, OSError, EOFError, UnicodeDecodeError) as error:
        raise MalformedBody(problem=f"The body is not a whole Arrow IPC stream: {str(error)[:200]}.") from None
    n_rows = sum(batch.num_rows for batch in batches)
    if not is_whole:
        raise MalformedBody(
            problem=f"The Arrow stream is cut off: {n_rows:,} cells arrived whole, but not its end-of-stream marker."
        )
    if not n_rows:
        raise NoCells
    cell_ids, clusters = (_names(batches, name) if name in schema.names else None for name in ("cell_id", "cluster"))
    cells = Cells(genes=genes, counts=_counts(batches, len(genes)), cell_ids=cell_ids, clusters=clusters)
    if known is None and schema.names == ["gene", "count"]:
        known_bodies.add(KnownBody.of(body, genes, *(_NUMPY[field.type.value_type.id] for field in schema)))
    return cells


def new_bytes(body: bytes) -> int:
    """Bytes that are no part of a schema that is known: what there is to read, where the names of a genome outweigh a cell."""
    known = known_bodies.find(body)
    return len(body) if known is None else len(body) - len(known.prefix)


def read_genes(body: bytes) -> tuple[str, ...]:
    """Names of the genes in the metadata of a stream's schema; what follows it is not looked at.

    Raises:
        MalformedBody: not an Arrow stream.
        InvalidCells: no list of names in the metadata.
    """
    try:
        with pa.ipc.open_stream(body) as reader:
            return _genes(reader.schema)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise MalformedBody(problem=f"The body is not an Arrow IPC stream: {str(error)[:200]}.") from None


def _genes(schema: pa.Schema) -> tuple[str, ...]:
    encoded = (schema.metadata or {}).get(GENES_KEY)
    if encoded is None:
        raise InvalidCells(problem="The schema's metadata lack 'genes': a JSON list of the names that `gene` indexes.")
    return _decoded_genes(encoded)


@remembered
def _decoded_genes(encoded: bytes) -> tuple[str, ...]:
    try:
        return check_names(strict_json.loads(encoded), "genes")
    except ValueError as error:
        raise InvalidCells(problem=f"'genes' in the schema's metadata is not a JSON list: {error}.") from None


def _check_types(schema: pa.Schema) -> None:
    names = schema.names
    if unknown := sorted(set(names) - set(COLUMNS)):
        raise InvalidCells(problem=f"Unknown column {unknown[0][:60]!r}. The columns are: {', '.join(COLUMNS)}.")
    if len(set(names)) != len(names):
        raise InvalidCells(problem="A column occurs twice.")
    for name, allowed in (("gene", GENE_TYPES), ("count", COUNT_TYPES)):
        if name not in names:
            raise InvalidCells(problem=f"Column '{name}' is missing; it must be of type {_lists_of(allowed)}.")
        found = schema.field(name).type
        if not pa.types.is_list(found) or found.value_type not in allowed:
            raise InvalidCells(problem=f"Column '{name}' must be of type {_lists_of(allowed)}, not {found}.")


def _lists_of(allowed: Sequence[pa.DataType]) -> str:
    return f"list<{'|'.join(map(str, allowed))}>"


def _counts(batches: list[pa.RecordBatch], n_genes: int) -> sp.csr_matrix:
    indices, values, lengths = [], [], []
    n_before = 0
    for batch in batches:
        genes, counts = batch.column("gene"), batch.column("count")
        if genes.null_count or counts.null_count:
            raise InvalidCells(problem=f"A cell of rows {n_before}-{n_before + batch.num_rows - 1} is null.")
        gene_offsets, count_offsets = _offsets(genes), _offsets(counts)
        sizes = gene_offsets[1:] - gene_offsets[:-1]
        is_unlike = sizes != count_offsets[1:] - count_offsets[:-1]
        if is_unlike.any():
            cell = n_before + int(np.argmax(is_unlike))
            raise InvalidCells(problem=f"Cell {cell} has another number of genes than of counts.")
        inner_genes = genes.values[gene_offsets[0] : gene_offsets[-1]]
        inner_counts = counts.values[count_offsets[0] : count_offsets[-1]]
        if inner_genes.null_count or inner_counts.null_count:
            raise InvalidCells(problem=f"A gene or count in rows {n_before}-{n_before + batch.num_rows - 1} is null.")
        index = _numpy(inner_genes)
        if len(index) and (index.max() >= n_genes or (index.dtype.kind == "i" and index.min() < 0)):
            first = int(np.argmax((index < 0) | (index >= n_genes)))
            cell = n_before + int(np.searchsorted(gene_offsets - gene_offsets[0], first, side="right")) - 1
            raise InvalidCells(problem=f"Cell {cell} has gene index {index[first]}, but 'genes' has {n_genes:,} names.")
        indices.append(index)
        values.append(_numpy(inner_counts))
        lengths.append(sizes)
        n_before += batch.num_rows
    indptr = np.zeros(n_before + 1, np.int64)
    _joined(lengths).cumsum(out=indptr[1:])
    return csr(_joined(values), _joined(indices), indptr, n_genes)


# pyarrow's own conversions import pandas at the first call (a second and 50 MB, within somebody's request); these do not.


def _numpy(array: pa.Array) -> np.ndarray[Any, Any]:
    """The numbers of a primitive array without nulls, where they lie."""
    dtype = _NUMPY[array.type.id]
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.empty(0, dtype)
    return np.frombuffer(buffer, dtype, count=len(array), offset=array.offset * dtype.itemsize)


def _offsets(lists: pa.ListArray) -> np.ndarray[Any, Any]:
    """Where each list starts in the values, and where the last one ends."""
    buffer = lists.buffers()[1]
    if buffer is None or not len(lists):
        return np.zeros(1, np.int32)
    return np.frombuffer(buffer, np.int32, count=len(lists) + 1, offset=lists.offset * 4)


def _arrow(array: np.ndarray[Any, Any]) -> pa.Array:
    """A one-dimensional array of float32, int32 or bool, without a copy where its layout is Arrow's."""
    if array.dtype == bool:
        return pa.Array.from_buffers(pa.bool_(), len(array), [None, pa.py_buffer(_packed(array))])
    return pa.Array.from_buffers(_ARROW[array.dtype], len(array), [None, pa.py_buffer(np.ascontiguousarray(array))])


def _packed(truths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A bit for each."""
    return np.packbits(truths, bitorder="little")


def _strings(words: Sequence[str]) -> pa.Array:
    """A string array."""
    encoded = [word.encode() for word in words]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def _lists(column: LabelLists) -> pa.Array:
    """Plain words, not those of a dictionary: each record batch has others."""
    is_there = column.codes >= 0
    words = _strings(column.words).take(_arrow(column.codes[is_there]))
    if not column.is_ragged:
        return pa.FixedSizeListArray.from_arrays(words, column.codes.shape[1])
    offsets = np.concatenate(([0], np.cumsum(is_there.sum(axis=1)))).astype(np.int32)
    return pa.ListArray.from_arrays(_arrow(offsets), words)


def _joined(arrays: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _names(batches: list[pa.RecordBatch], name: str) -> tuple[str, ...]:
    column = pa.chunked_array([batch.column(name) for batch in batches])
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) or column.null_count:
        raise InvalidCells(problem=f"Column '{name}' must be of type string without nulls, not {column.type}.")
    return check_names(column.to_pylist(), name)


class ArrowWriter:
    """Writes an Arrow IPC stream, one record batch per call; the schema's metadata hold the head under "cellserve"."""

    def __init__(self) -> None:
        self._head = b""
        self._first: Columns | None = None
        """The first cells, while Arrow has not written them itself."""

        self._writer: pa.RecordBatchWriter | None = None

    def start(self, head: dict[str, Any]) -> bytes:
        """Nothing yet: the schema is known with the first cells."""
        self._head = orjson.dumps(head)
        return b""

    def write(self, columns: Columns, cell_ids: Sequence[str] | None) -> bytes:
        """A record batch, after the schema where it is the first."""
        if self._writer is None and self._first is None and cell_ids is None and n_cells(columns) <= MAX_ROWS:
            return self._like_another(columns)
        self._catch_up()
        return self._by_arrow(columns, cell_ids)

    def end(self) -> bytes:
        """The end-of-stream marker; without it the stream is cut off."""
        if self._writer is None:
            assert self._first is not None, "an answer has at least one cell"
            return END
        self._writer.close()
        return self._drained()

    def fail(self, problem: bytes) -> bytes:
        """A record batch without rows that carries a problem document; no end-of-stream marker follows it."""
        self._catch_up()
        assert self._writer is not None, "before the first cell a problem is an answer of its own"
        empty = [pa.array([], field.type) for field in self._schema]
        batch = pa.record_batch(empty, schema=self._schema)
        self._writer.write_batch(batch, custom_metadata={PROBLEM_KEY: problem})
        return self._drained()

    def _like_another(self, columns: Columns) -> bytes:
        """A short first batch, in the place of another's where Arrow has written one like it."""
        likeness: list[object] = [len(self._head), n_cells(columns)]
        numbers = []
        for name, column in columns.items():
            if isinstance(column, LabelLists):
                return self._by_arrow(columns, None)
            array = column.codes if isinstance(column, Labels) else column.values
            fixed = (
                column.words if isinstance(column, Labels) else column.names if isinstance(column, Vectors) else None
            )
            likeness += (name, type(column), array.dtype, array.shape, fixed)
            numbers.append((_packed(array) if array.dtype == bool else array).tobytes())
        if (known := known_answers.find(tuple(likeness))) is not None:
            self._first = columns
            return known.filled(self._head, numbers)
        content = self._by_arrow(columns, None)
        known_answers.add(KnownAnswer.of(tuple(likeness), content, self._head, numbers))
        return content

    def _catch_up(self) -> None:
        """Have Arrow write what it has not: what follows depends on what it wrote before."""
        if self._first is not None:
            self._by_arrow(self._first, None)
            self._first = None

    def _by_arrow(self, columns: Columns, cell_ids: Sequence[str] | None) -> bytes:
        arrays = {} if cell_ids is None else {"cell_id": _strings(cell_ids)}
        for name, column in columns.items():
            if isinstance(column, Labels):
                arrays[name] = pa.DictionaryArray.from_arrays(_arrow(column.codes), _strings(column.words))
            elif isinstance(column, LabelLists):
                arrays[name] = _lists(column.used())
            elif isinstance(column, Vectors):
                width = column.values.shape[1]
                arrays[name] = pa.FixedSizeListArray.from_arrays(_arrow(column.values.reshape(-1)), width)
            else:
                arrays[name] = _arrow(column.values)
        if self._writer is None:
            self._schema = _schema(arrays, columns, self._head)
            self._sink = io.BytesIO()
            # Arrow writes in small pieces, and for each it would wait for the interpreter's lock, which the threads that compute want as well.
            self._buffer = pa.BufferedOutputStream(pa.PythonFile(self._sink, mode="w"), _BUFFER_BYTES)
            self._writer = pa.ipc.new_stream(self._buffer, self._schema, options=_OPTIONS)
        self._writer.write_batch(pa.RecordBatch.from_arrays(list(arrays.values()), schema=self._schema))
        return self._drained()

    def _drained(self) -> bytes:
        self._buffer.flush()
        content = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return content


def _schema(arrays: Mapping[str, pa.Array], columns: Columns, head: bytes) -> pa.Schema:
    """That of an answer; names of a vector's components are metadata of its field."""
    fields = []
    for name, array in arrays.items():
        column = columns.get(name)
        names = column.names if isinstance(column, Vectors) else None
        metadata = {"names": json.dumps(names)} if names is not None else None
        fields.append(pa.field(name, array.type, nullable=False, metadata=metadata))
    return pa.schema(fields, metadata={"cellserve": head})


FORMAT = Format(
    media_type="application/vnd.apache.arrow.stream",
    read=read,
    writer=ArrowWriter,
    description="An Arrow IPC stream. One row per cell: `gene` (list of indices into the JSON list `genes` of the schema's metadata), "
    "`count` (list of the same length), optionally `cell_id` (string), `cluster` (string, which only `check` and `markers` look at) and "
    "`batch` (ignored by models whose encoder needs no batch, which are all of schema_version 1). Record batches may be compressed (lz4, "
    "zstd). The answer streams back batch by batch.",
    schema={"type": "string", "format": "binary"},
    read_genes=read_genes,
)
