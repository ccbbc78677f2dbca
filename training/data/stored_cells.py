"""Cells on disk: the model's genes only, row after row in one file, read when a minibatch asks for them.

The user's file is read twice, in order, to make it: once to choose genes and once to keep their counts. After that an epoch draws rows in
any order at the price of one read each, so that training out of core meets the same cells in the same order as in memory, bit for bit.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from training.data.counts import check_counts
from training.data.minibatches import Cells, Minibatch

ROWS = 8_192
"""Cells of the user's file that are in memory at a time."""

SCRATCH_PREFIX = "cells-"
"""Of the names of the temporary files."""


class StoredCells:
    """Counts in a temporary file, everything else in memory; used like `Cells`. The file goes with the object."""

    def __init__(
        self,
        scratch: Path | None,
        n_genes: int,
        batch: NDArray[np.int64],
        labels: NDArray[np.int64],
        names: Any,
        obsm: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Begin with no counts; `append` adds them in the order of the other arguments.

        Args:
            scratch: existing directory for the file; None for the system's.
            n_genes: columns.
            batch: technical batch of each cell, (n_cells,).
            labels: class per label level, (n_cells, n_levels).
            names: of the cells, (n_cells,).
            obsm: what else a family is fitted to, each (n_cells, n_columns).
        """
        self.batch, self.labels, self.names, self.obsm = batch, labels, names, obsm
        self._n_genes = n_genes
        # The smallest number that holds a column; counts are float32 in memory too, so that nothing is lost.
        self._record = np.dtype([("column", np.uint16 if n_genes <= 1 << 16 else np.uint32), ("count", np.float32)])
        self._start = np.zeros(1, np.int64)
        self._handle, path = tempfile.mkstemp(prefix=SCRATCH_PREFIX, dir=scratch)
        weakref.finalize(self, _remove, self._handle, path)

    def __len__(self) -> int:
        return len(self.batch)

    def append(self, counts: sp.csr_matrix) -> None:
        """Write the next rows."""
        records = np.empty(counts.nnz, self._record)
        records["column"], records["count"] = counts.indices, counts.data
        place, content = int(self._start[-1]) * self._record.itemsize, memoryview(records.tobytes())
        while content:
            n_written = os.pwrite(self._handle, content, place)
            place, content = place + n_written, content[n_written:]
        self._start = np.concatenate([self._start, self._start[-1] + np.cumsum(np.diff(counts.indptr), dtype=np.int64)])

    def take(self, positions: NDArray[np.int64]) -> Cells:
        """The cells at `positions`, in that order, in memory."""
        first, last = self._start[positions], self._start[positions + 1]
        width, handle = self._record.itemsize, self._handle
        parts = [
            os.pread(handle, (j - i) * width, i * width) for i, j in zip(first.tolist(), last.tolist(), strict=True)
        ]
        records = np.frombuffer(b"".join(parts), self._record)
        indptr = np.concatenate([[0], np.cumsum(last - first)])
        counts = sp.csr_matrix(
            (records["count"].copy(), records["column"].astype(np.int32), indptr), shape=(len(positions), self._n_genes)
        )
        obsm = {key: values[positions] for key, values in self.obsm.items()}
        return Cells(counts, self.batch[positions], self.labels[positions], self.names[positions], obsm)

    def minibatch(self) -> Minibatch:
        """All cells as one minibatch."""
        return self.take(np.arange(len(self))).minibatch()

    @property
    def counts(self) -> sp.csr_matrix:
        """All counts, in memory."""
        return self.take(np.arange(len(self))).counts


def _remove(handle: int, path: str) -> None:
    os.close(handle)
    Path(path).unlink(missing_ok=True)


def row_blocks(matrix: Any) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Position of the first row and the rows of one block after the other, in memory."""
    for start in range(0, matrix.shape[0], ROWS):
        yield start, sp.csr_matrix(matrix[start : start + ROWS])


def read_rows(matrix: Any, positions: NDArray[np.int64], name: str, cells: Any, genes: Any) -> sp.csr_matrix:
    """The rows at ascending `positions` of a matrix on disk, float32.

    Raises:
        BadFile: one of them holds something else than counts.
    """
    parts = []
    for start, block in row_blocks(matrix):
        inside = positions[np.searchsorted(positions, start) : np.searchsorted(positions, start + ROWS)]
        if len(inside):
            parts.append(check_counts(block[inside - start], Path(name), cells[inside], genes))
    return sp.vstack(parts, format="csr")


def store(
    matrix: Any,
    parts: list[tuple[NDArray[np.int64], StoredCells]],
    genes: NDArray[np.int64],
    name: str,
    cells: Any,
    gene_names: Any,
) -> None:
    """Write rows of a matrix on disk, over `genes`, to where they belong.

    Args:
        matrix: on disk, (n_cells, n_genes of the file).
        parts: ascending positions of rows, and what they are appended to.
        genes: columns that are kept, ascending.
        name: of the data set, for errors.
        cells: names of the rows, for errors.
        gene_names: of the columns, for errors.

    Raises:
        BadFile: a row holds something else than counts.
    """
    for start, block in row_blocks(matrix):
        for positions, target in parts:
            inside = positions[np.searchsorted(positions, start) : np.searchsorted(positions, start + ROWS)]
            if len(inside):
                rows = check_counts(block[inside - start], Path(name), cells[inside], gene_names)
                chosen = rows[:, genes]
                chosen.sort_indices()
                target.append(chosen)
