"""A query put together from pieces that are never in memory together: aligned, what the model does not use left out, and kept in files."""

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.counts import Cells, CountsReport, check_raw, csr
from service.cells.genes import align, library_size
from service.errors import InvalidCells
from service.inference.model import Model
from service.inference.query import Query


class Gathered:
    """Cells for one model, piece by piece."""

    def __init__(
        self, model: Model, genes: tuple[str, ...], cell_ids: tuple[str, ...], files: tuple[IO[bytes], IO[bytes]]
    ) -> None:
        """Begin a query.

        Args:
            model: which is to answer.
            genes: names of the columns of all pieces.
            cell_ids: of all cells.
            files: empty, for counts and for their columns; closed by whoever opened them, at any time after `query`.

        Raises:
            TooFewGenes: the genes are not those of the model.
        """
        self._model, self._genes, self._cell_ids, self._files = model, genes, cell_ids, files
        self._positions, self._genes_report = model.genes.locate(genes)
        self._lengths: list[NDArray[np.int64]] = []
        self._libraries: list[NDArray[np.float32]] = []
        self._reports: list[CountsReport] = []
        self._n_cells = 0

    def add(self, counts: sp.csr_matrix) -> None:
        """The next cells.

        Raises:
            NotRawCounts: a value is no count.
            InvalidCells: there are more cells than names.
        """
        stop = self._n_cells + counts.shape[0]
        if stop > len(self._cell_ids):
            raise InvalidCells(problem=f"There are more cells than the {len(self._cell_ids):,} names of cells.")
        cells = Cells(self._genes, counts, self._cell_ids[self._n_cells : stop])
        self._reports.append(check_raw(cells, self._n_cells))
        # Not known to be exact: columns are added in float64 then, which are the same numbers, and only genes of the model stay.
        aligned = align(counts, self._positions, self._model.manifest.genes.n_genes)
        self._libraries.append(library_size(aligned))
        self._lengths.append(np.diff(aligned.indptr).astype(np.int64))
        for file, array in zip(self._files, (aligned.data, aligned.indices), strict=True):
            file.write(np.ascontiguousarray(array).data)
        self._n_cells = stop

    def query(self, source: str) -> Query:
        """All cells; their counts are read from the files as they are needed.

        Args:
            source: where they come from, for the head of the answer.

        Raises:
            InvalidCells: there are fewer cells than names.
        """
        if self._n_cells != len(self._cell_ids):
            raise InvalidCells(
                problem=f"There are {self._n_cells:,} cells, but {len(self._cell_ids):,} names of cells."
            )
        indptr = np.concatenate(([0], np.cumsum(np.concatenate(self._lengths))))
        data, indices = (
            _mapped(file, kind, int(indptr[-1])) for file, kind in zip(self._files, ("f4", "i4"), strict=True)
        )
        return Query(
            counts=csr(data, indices, indptr, self._model.manifest.genes.n_genes),
            library_size=np.concatenate(self._libraries),
            cell_ids=self._cell_ids,
            genes_report=self._genes_report,
            counts_report=_joined(self._reports, source),
        )


def _mapped(file: IO[bytes], kind: str, n_values: int) -> NDArray[Any]:
    file.flush()
    # An empty file cannot be mapped.
    return np.asarray(np.memmap(file, kind, "r", shape=(n_values,))) if n_values else np.empty(0, kind)


def _joined(reports: Sequence[CountsReport], source: str) -> CountsReport:
    """What all pieces looked like; suspicions are those of the first."""
    return CountsReport(
        n_cells=sum(report.n_cells for report in reports),
        n_empty=sum(report.n_empty for report in reports),
        warnings=reports[0].warnings,
        largest_library=max(report.largest_library for report in reports),
        source=source,
    )
