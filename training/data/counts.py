"""What counts are: finite, not negative, whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from training.data.formats.errors import BadFile

EXPECTED = "raw counts"
LARGEST = 2**24
"""Above it float32 no longer holds every whole number."""

_FAULTS = (
    ("a value that is not finite", lambda v: ~np.isfinite(v)),
    ("a negative count", lambda v: v < 0),
    ("a count that is not whole (are they normalised? Name the `layer` with raw counts)", lambda v: v != np.rint(v)),
    (f"a count above {LARGEST:,}", lambda v: v > LARGEST),
)


def check_counts(matrix: Any, path: Path, cells: Sequence[str], genes: Sequence[str]) -> sp.csr_matrix:
    """The matrix as CSR float32, if it holds counts.

    Args:
        matrix: sparse or dense, shape (n_cells, n_genes).
        path: where it is from, for the error.
        cells: names of the rows.
        genes: names of the columns.

    Raises:
        BadFile: with the first cell and gene of a value that is no count.
    """
    if getattr(matrix, "dtype", np.dtype(object)).kind not in "biuf":
        raise BadFile(path, EXPECTED, f"values of type {getattr(matrix, 'dtype', type(matrix).__name__)}")
    # Looked at before it becomes float32, which would round.
    counts = matrix.tocsr() if sp.issparse(matrix) else sp.csr_matrix(np.asarray(matrix))
    for fault, is_fault in _FAULTS:
        if (wrong := np.flatnonzero(is_fault(counts.data))).size:
            i = wrong[0]
            row = int(np.searchsorted(counts.indptr, i, side="right")) - 1
            raise BadFile(
                path,
                EXPECTED,
                f"{fault}: {counts.data[i]:g} in cell '{cells[row]}', gene '{genes[counts.indices[i]]}' ({wrong.size:,} in all)",
            )
    result = sp.csr_matrix(counts, dtype=np.float32)
    result.sum_duplicates()
    result.eliminate_zeros()
    return result
