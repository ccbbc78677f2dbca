"""Cells made ready for a model: checked, aligned, and with a report of both for the head of the answer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.counts import MAX_EXACT, Cells, CountsReport, check_raw
from service.cells.genes import AlignmentReport, align, library_size
from service.inference.model import Model
from service.inference.task import Options, Task


@dataclass(frozen=True)
class Query:
    """What a task runs on, and what is said about it."""

    counts: sp.csr_matrix
    """Aligned to the model's genes, shape (n_cells, n_genes)."""

    library_size: NDArray[np.float32]
    """Counts per cell in the genes of the model, shape (n_cells,)."""

    cell_ids: tuple[str, ...] | None
    genes_report: AlignmentReport
    counts_report: CountsReport

    def head(self, model: Model, task: Task, options: Options, request_id: str | None = None) -> dict[str, Any]:
        """What every answer says besides its cells."""
        return {
            "model": {"name": model.manifest.name, "version": model.manifest.version},
            "task": task.name,
            "request_id": request_id,
            "genes": self.genes_report.as_dict(),
            "counts": self.counts_report.as_dict(),
            **options.about(model),
        }


def prepare(model: Model, cells: Cells) -> Query:
    """Align cells to a model's genes and check that their values are raw counts.

    Raises:
        TooFewGenes: the genes are not those of the model.
        NotRawCounts: the values are no counts.
    """
    positions, genes_report = model.genes.locate(cells.genes)
    counts_report = check_raw(cells)
    is_plain = not genes_report.n_duplicated and counts_report.largest_library < MAX_EXACT
    counts = align(cells.counts, positions, model.manifest.genes.n_genes, is_plain)
    return Query(
        counts=counts,
        library_size=library_size(counts),
        cell_ids=cells.cell_ids,
        genes_report=genes_report,
        counts_report=counts_report,
    )
