"""Raw counts: what a request holds before alignment, and the check that they are counts at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.errors import NotRawCounts

MAX_EXACT = 2**24
"""Largest count up to which float32 holds every integer."""

# A cell that a droplet or a well really yields has hundreds of counts and most of its genes at 1; ln(1 + x) rounded to integers does not.
LOG_LIKE_MAXIMUM = 13
READ_LIKE_MEDIAN = 200_000


@dataclass(frozen=True)
class Cells:
    """The cells of one request, as sent."""

    genes: tuple[str, ...]
    """Names of the columns of `counts`, as sent."""

    counts: sp.csr_matrix
    """Shape (n_cells, len(genes)), any numeric dtype; a gene may occur twice within a cell."""

    cell_ids: tuple[str, ...] | None = None
    clusters: tuple[str, ...] | None = None
    """Name of the cluster of each cell, for questions about all cells together; what a cell is answered does not depend on it."""

    def __len__(self) -> int:
        return int(self.counts.shape[0])


@dataclass(frozen=True)
class CountsReport:
    """What the values looked like. Travels in every answer."""

    n_cells: int
    n_empty: int
    """Cells without a single count among all genes that were sent."""

    warnings: tuple[str, ...]
    largest_library: float = 0.0
    """Counts of the cell that has most; below `MAX_EXACT`, float32 sums of a cell's counts are exact."""

    source: str | None = None
    """Where in an uploaded file the counts were: X, raw/X or layers/<name>."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {"n_cells": self.n_cells, "n_empty": self.n_empty, "warnings": list(self.warnings)}
        return plain if self.source is None else {**plain, "source": self.source}


def check_raw(cells: Cells, n_before: int = 0) -> CountsReport:
    """Look at every value and refuse what is no raw count.

    Args:
        cells: some or all of a request.
        n_before: cells of the request that came before these, for messages.

    Returns:
        The number of empty cells, and warnings about values that are possible but suspicious.

    Raises:
        NotRawCounts: a value is NaN, infinite, negative, fractional or above 2**24, with the first such cell and gene and what it looks like.
    """
    values = cells.counts.data
    kind = values.dtype.kind
    # One number decides each question where all is well; where it is is looked for only when it is not.
    highest = np.maximum.reduce(values) if len(values) else 0
    lowest = np.minimum.reduce(values) if len(values) and kind != "u" else 0
    if kind == "f" and not (np.isfinite(lowest) and np.isfinite(highest)):
        raise _refusal(
            cells,
            n_before,
            ~np.isfinite(values),
            "not finite",
            "NaN and infinity are no counts: a step before this one divided by zero or overflowed.",
        )
    if lowest < 0:
        raise _refusal(cells, n_before, values < 0, "negative", "The values look scaled or centred. Send raw counts.")
    if kind == "f":
        fractional = values != np.rint(values)
        if fractional.any():
            raise _refusal(cells, n_before, fractional, "fractional", _normalisation(values))
    if highest > MAX_EXACT:
        raise _refusal(
            cells,
            n_before,
            values > MAX_EXACT,
            f"over {MAX_EXACT:,}",
            "No cell yields that many counts of one gene; beyond it they are not exact.",
        )
    library_size = row_sums(cells.counts)
    filled = library_size[library_size > 0]
    largest = float(np.maximum.reduce(filled)) if len(filled) else 0.0
    return CountsReport(
        n_cells=len(cells),
        n_empty=len(library_size) - len(filled),
        warnings=_warnings(values, highest, filled, largest),
        largest_library=largest,
    )


def _warnings(values: NDArray[Any], highest: float, filled: NDArray[np.float64], largest: float) -> tuple[str, ...]:
    """Suspicions that are no proof.

    Args:
        values: all of them.
        highest: the largest.
        filled: library size of the cells that have counts.
        largest: of those.
    """
    if not len(filled):
        return ()
    warnings = []
    # Counts of a droplet are mostly ones and have a long tail; rounded logarithms have neither.
    if highest <= LOG_LIKE_MAXIMUM:
        n_nonzero, n_ones = np.count_nonzero(values), np.count_nonzero(values == 1)
        if n_nonzero > 1000 and n_ones / n_nonzero < 0.5:
            warnings.append(
                f"All values are integers, but none is above {int(highest)} and only {n_ones / n_nonzero:.0%} are 1: these may be "
                "rounded log values. Send raw counts."
            )
    if largest > READ_LIKE_MEDIAN and np.median(filled) > READ_LIKE_MEDIAN:  # the first is quick
        warnings.append(
            f"The median cell has {np.median(filled):,.0f} counts: these look like reads, not unique molecules. The model was trained on "
            "molecules (UMI); read counts are answered, with less certainty than stated."
        )
    return tuple(warnings)


def _normalisation(values: NDArray[Any]) -> str:
    """What fractional values look like, and what to do."""
    advice = "Send raw counts: layers['counts'] or adata.raw.X where they were kept."
    if values.max() < 20:
        return f"The values end at {values.max():.3g}: they look log-normalised. {advice}"
    return (
        f"The values look normalised (counts per ten thousand or million, TPM) or corrected for ambient RNA. {advice}"
    )


def _refusal(cells: Cells, n_before: int, is_wrong: NDArray[np.bool_], kind: str, hint: str) -> NotRawCounts:
    """The error for the first wrong value, with the number of wrong values in its cell."""
    first = int(np.argmax(is_wrong))
    row = int(np.searchsorted(cells.counts.indptr, first, side="right")) - 1
    in_row = slice(cells.counts.indptr[row], cells.counts.indptr[row + 1])
    name = f" ('{cells.cell_ids[row][:40]}')" if cells.cell_ids else ""
    return NotRawCounts(
        cell=f"Cell {n_before + row}{name}",
        kind=kind,
        n_values=int(is_wrong[in_row].sum()),
        value=f"{cells.counts.data[first]:.6g}",
        gene=cells.genes[cells.counts.indices[first]][:60],
        hint=hint,
    )


def csr(
    data: NDArray[Any],
    indices: NDArray[Any],
    indptr: NDArray[Any],
    n_genes: int,
    sums: NDArray[np.float64] | None = None,
) -> sp.csr_matrix:
    """A matrix of arrays that are known to fit together, with its `row_sums` where they are known.

    scipy's constructor would look at them again, which takes longer than the rest of aligning one cell.
    """
    matrix = sp.csr_matrix.__new__(sp.csr_matrix)
    vars(matrix).update(
        _EMPTY,
        _shape=(len(indptr) - 1, n_genes),
        data=data,
        indices=indices.astype(np.int32, copy=False),
        indptr=indptr.astype(np.int32, copy=False),
    )
    if sums is not None:
        vars(matrix)[_SUMS] = sums
    return matrix


_EMPTY = vars(sp.csr_matrix((0, 0)))
"""What scipy keeps in a matrix, whatever its version."""

_SUMS = "_cellserve_row_sums"


def row_sums(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Counts of each cell, (n_cells,), added up in float64 so that no order shows; scipy's own takes six times as long for one cell.

    They stay with the matrix, since checking, aligning and answering all need them: its counts must not be changed afterwards.
    """
    known: NDArray[np.float64] | None = vars(counts).get(_SUMS)
    if known is not None:
        return known
    sums = np.zeros(counts.shape[0])
    (filled,) = (counts.indptr[1:] - counts.indptr[:-1]).nonzero()
    if len(filled):
        sums[filled] = np.add.reduceat(counts.data, counts.indptr[filled], dtype=np.float64)
    sums.setflags(write=False)
    vars(counts)[_SUMS] = sums
    return sums


def some_rows(counts: sp.csr_matrix, start: int, stop: int) -> sp.csr_matrix:
    """Some rows, without a copy of what they hold, and with their sums where those of all are known."""
    if (start, stop) == (0, counts.shape[0]):
        return counts
    first, last = counts.indptr[start], counts.indptr[stop]
    # Not added up here: numpy would make a copy of all counts for it, and those of a file that was sent stay on disk.
    sums: NDArray[np.float64] | None = vars(counts).get(_SUMS)
    return csr(
        counts.data[first:last],
        counts.indices[first:last],
        counts.indptr[start : stop + 1] - first,
        counts.shape[1],
        None if sums is None else sums[start:stop],
    )


def stacked(parts: Sequence[sp.csr_matrix]) -> sp.csr_matrix:
    """The rows of all, one after the other."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([len(part.data) for part in parts])
    return csr(
        np.concatenate([part.data for part in parts]),
        np.concatenate([part.indices for part in parts]),
        np.concatenate(
            [parts[0].indptr, *(part.indptr[1:] + end for part, end in zip(parts[1:], ends[:-1], strict=True))]
        ),
        parts[0].shape[1],
        np.concatenate([row_sums(part) for part in parts]),
    )
