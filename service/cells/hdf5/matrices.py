"""Counts in an HDF5 file, csr, csc or dense, given some rows at a time in bounded memory. Used in the parse process only."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from service.cells.hdf5.plain import PlainFile, native, slices
from service.errors import InvalidCells

BLOCK_VALUES = 2**20
"""Values that are read and sent at a time."""

BUCKET_VALUES = 2**22
"""Values of a csc matrix that are sorted at a time."""

DENSE_BYTES = 32 * 2**20
"""Of a dense matrix at a time."""

MAX_AXIS = 2**31 - 1


@dataclass(frozen=True)
class Block:
    """Some rows, one after the other."""

    indptr: NDArray[np.int64]
    """Where each row starts in the others, from 0, and where the last ends."""

    indices: NDArray[Any]
    values: NDArray[Any]


class Matrix(Protocol):
    """Rows of numbers, most of them zero."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""

    def blocks(self, scratch: int) -> Iterator[Block]:
        """All rows in order; `scratch` is the descriptor of an empty file that may be used on the way."""

    def sample(self) -> NDArray[Any]:
        """Some of the values, the first in the file."""


def open_matrix(file: PlainFile, path: str) -> Matrix:
    """The matrix at a path.

    Raises:
        InvalidCells: there is none, or it is not whole.
        FileRefused, FileTooLarge: as PlainFile says.
    """
    if file.group(path) is None:
        return Dense(file.numbers(path, 2), path)
    # h5sparse is what anndata before 0.6.23 wrote.
    kind = file.attribute(path, "encoding-type") or file.attribute(path, "h5sparse_format")
    shape = file.attribute(path, "shape")
    shape = file.attribute(path, "h5sparse_shape") if shape is None else shape
    kind = str(kind).removesuffix("_matrix")
    if kind not in ("csr", "csc") or np.shape(shape) != (2,):
        raise InvalidCells(
            problem=f"'{path}' is a group without the attributes of a csr or csc matrix (encoding-type, shape)."
        )
    n_rows, n_columns = int(shape[0]), int(shape[1])
    if not (0 <= n_rows <= MAX_AXIS and 0 <= n_columns <= MAX_AXIS):
        raise InvalidCells(problem=f"'{path}' has the shape {n_rows:,} by {n_columns:,}, beyond every data set.")
    indptr = native(file.numbers(f"{path}/indptr", 1, "ui")[()]).astype(np.int64)
    indices, data = file.numbers(f"{path}/indices", 1, "ui"), file.numbers(f"{path}/data", 1)
    n_lines = n_rows if kind == "csr" else n_columns
    if len(indptr) != n_lines + 1:
        raise InvalidCells(problem=f"'{path}/indptr' has {len(indptr):,} entries, but its shape says {n_lines + 1:,}.")
    if indptr[0] != 0 or indptr[-1] != len(data) or len(data) != len(indices) or (np.diff(indptr) < 0).any():
        raise InvalidCells(
            problem=f"'{path}/indptr' must rise from 0 to the {len(data):,} values of '{path}/data' and never fall, and there must be as many "
            f"'{path}/indices', of which there are {len(indices):,}."
        )
    longest = int(np.diff(indptr).max(initial=0))
    if longest > (n_columns if kind == "csr" else n_rows):
        raise InvalidCells(
            problem=f"'{path}' has a line of {longest:,} values, but the shape {n_rows:,} by {n_columns:,}."
        )
    if kind == "csr":
        return Csr((n_rows, n_columns), indptr, indices, data)
    return Csc(path, (n_rows, n_columns), indptr, indices, data)


@dataclass(frozen=True)
class Csr:
    """Rows one after the other."""

    shape: tuple[int, int]
    indptr: NDArray[np.int64]
    indices: h5py.Dataset
    data: h5py.Dataset

    def blocks(self, scratch: int) -> Iterator[Block]:  # noqa: ARG002 - Matrix's signature
        """As many rows as have at most `BLOCK_VALUES`, and at least one."""
        for start, stop in whole_lines(self.indptr, BLOCK_VALUES):
            first, last = self.indptr[start], self.indptr[stop]
            yield Block(
                self.indptr[start : stop + 1] - first, native(self.indices[first:last]), native(self.data[first:last])
            )

    def sample(self) -> NDArray[Any]:
        """Of the first rows."""
        return native(self.data[:BLOCK_VALUES])


@dataclass(frozen=True)
class Csc:
    """Columns one after the other: sorted by row through a file, because memory would not hold all of them."""

    path: str
    shape: tuple[int, int]
    indptr: NDArray[np.int64]
    indices: h5py.Dataset
    data: h5py.Dataset

    def blocks(self, scratch: int) -> Iterator[Block]:
        """Values are put into buckets of neighbouring rows, and each bucket is then sorted by itself."""
        ends = self._row_ends()
        buckets = list(whole_lines(ends, BUCKET_VALUES))
        sample = native(self.data[:0])
        entry = np.dtype([("row", "<i4"), ("column", "<i4"), ("value", sample.dtype)])
        edges = np.array([start for start, _ in buckets] + [self.shape[0]])
        position = ends[edges[:-1]].copy()
        for first, last in slices(len(self.data), BLOCK_VALUES):
            entries = np.empty(last - first, entry)
            entries["row"] = self.indices[first:last]
            entries["column"] = np.searchsorted(self.indptr, np.arange(first, last), side="right") - 1
            entries["value"] = native(self.data[first:last])
            bucket = np.searchsorted(edges, entries["row"], side="right") - 1
            order = np.argsort(bucket, kind="stable")  # columns stay in their order
            entries, sizes = entries[order], np.bincount(bucket, minlength=len(buckets))
            begin = 0
            for number in np.flatnonzero(sizes):
                _write(scratch, entries[begin : begin + sizes[number]], int(position[number]) * entry.itemsize)
                begin += sizes[number]
                position[number] += sizes[number]
        for start, stop in buckets:
            n_values = int(ends[stop] - ends[start])
            content = os.pread(scratch, n_values * entry.itemsize, int(ends[start]) * entry.itemsize)
            entries = np.frombuffer(content, entry)
            entries = entries[np.argsort(entries["row"], kind="stable")]
            indptr = ends[start : stop + 1] - ends[start]
            for begin, end in whole_lines(indptr, BLOCK_VALUES):
                of_rows = entries[indptr[begin] : indptr[end]]
                yield Block(indptr[begin : end + 1] - indptr[begin], of_rows["column"], of_rows["value"])

    def sample(self) -> NDArray[Any]:
        """Of the first columns."""
        return native(self.data[:BLOCK_VALUES])

    def _row_ends(self) -> NDArray[np.int64]:
        n_values = np.zeros(self.shape[0] + 1, dtype=np.int64)
        for first, last in slices(len(self.indices), BLOCK_VALUES):
            rows = native(self.indices[first:last])
            if rows.min() < 0 or rows.max() >= self.shape[0]:
                raise InvalidCells(problem=f"'{self.path}/indices' names a row beyond the {self.shape[0]:,} rows.")
            n_values[1:] += np.bincount(rows.astype(np.int64), minlength=self.shape[0])
        return np.cumsum(n_values)


class Dense:
    """All values, zeros too."""

    def __init__(self, data: h5py.Dataset, path: str) -> None:
        """Make a matrix of a data set with two axes."""
        self.path, self._data = path, data
        self.shape = (int(data.shape[0]), int(data.shape[1]))

    def blocks(self, scratch: int) -> Iterator[Block]:  # noqa: ARG002 - Matrix's signature
        """As many rows as fit, whole chunks where the file has chunks that do: each is decompressed once then."""
        row_bytes = max(1, self.shape[1] * max(8, self._data.dtype.itemsize))
        n_at_once = max(1, min(BLOCK_VALUES // max(1, self.shape[1]), DENSE_BYTES // row_bytes))
        n_chunk = self._data.chunks[0] if self._data.chunks else 1
        if n_at_once < n_chunk and n_chunk * row_bytes <= 4 * DENSE_BYTES:
            n_at_once = n_chunk
        elif n_at_once > n_chunk:
            n_at_once -= n_at_once % n_chunk
        for start, stop in slices(self.shape[0], n_at_once):
            dense = native(self._data[start:stop])
            for first, last in slices(len(dense), max(1, BLOCK_VALUES // max(1, self.shape[1]))):
                rows, columns = np.nonzero(dense[first:last])  # NaN is not zero, and is still there to be found
                indptr = np.searchsorted(rows, np.arange(last - first + 1)).astype(np.int64)
                yield Block(indptr, columns.astype(np.int32), dense[first:last][rows, columns])

    def sample(self) -> NDArray[Any]:
        """Of the first rows."""
        if not self.shape[1]:
            return np.zeros(0)
        values = native(self._data[: max(1, BLOCK_VALUES // self.shape[1])]).reshape(-1)
        filled: NDArray[Any] = values[values != 0]
        return filled


def whole_lines(indptr: NDArray[np.int64], n_values: int) -> Iterator[tuple[int, int]]:
    """From which line to which, so that lines are whole and have at most `n_values` together, or are alone."""
    start, n_lines = 0, len(indptr) - 1
    while start < n_lines:
        stop = int(np.searchsorted(indptr, indptr[start] + n_values, side="right")) - 1
        stop = min(max(stop, start + 1), n_lines)
        yield start, stop
        start = stop


def _write(file: int, entries: NDArray[Any], position: int) -> None:
    content = memoryview(entries.tobytes())
    while len(content):
        written = os.pwrite(file, content, position)
        content, position = content[written:], position + written
