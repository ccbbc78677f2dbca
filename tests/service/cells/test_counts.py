"""The check that values are raw counts."""

import numpy as np
import pytest
import scipy.sparse as sp

from service.cells.counts import Cells, check_raw
from service.errors import NotRawCounts
from tests.builders import counts

GENES = tuple(f"G{number}" for number in range(40))


def cells(matrix: sp.csr_matrix, ids: tuple[str, ...] | None = None) -> Cells:
    return Cells(genes=GENES, counts=matrix, cell_ids=ids)


@pytest.mark.parametrize(
    ("value", "kind", "hint"),
    [
        (np.nan, "not finite", "NaN"),
        (np.inf, "not finite", "NaN and infinity"),
        (-1, "negative", "scaled"),
        (0.5, "fractional", "log-normalised"),
        (812.25, "fractional", "normalised (counts per"),
        (2**24 + 2, "over 16,777,216", "No cell yields"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_wrong_value_in_many(value: float, kind: str, hint: str, dtype: type) -> None:
    """The first wrong value is found wherever it is, and named with its cell, gene and number of companions."""
    matrix = counts(50).astype(dtype)
    start = matrix.indptr[37]
    matrix.data[start + 2 : start + 4] = value
    with pytest.raises(NotRawCounts) as refused:
        check_raw(cells(matrix, tuple(f"cell-{number}" for number in range(50))))

    assert refused.value.cell == "Cell 37 ('cell-37')"
    assert refused.value.gene == GENES[matrix.indices[start + 2]]
    assert refused.value.kind == kind
    assert refused.value.n_values == 2
    assert hint in refused.value.hint


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64, np.float32, np.float64])
def test_counts_of_any_type(dtype: type) -> None:
    """Whole numbers are counts in every numeric type; 2**24 is the largest."""
    report = check_raw(cells(counts(9).astype(dtype)))
    assert (report.n_cells, report.n_empty, report.warnings) == (9, 0, ())


def test_the_largest_count() -> None:
    """2**24 is still exact."""
    matrix = counts(2)
    matrix.data[0] = 2**24
    check_raw(cells(matrix))


def test_empty_cells_are_counted() -> None:
    """Cells without counts are no error; stored zeros are no counts."""
    matrix = sp.vstack([counts(3), sp.csr_matrix((2, 40))], format="csr")
    matrix.data[matrix.indptr[1] : matrix.indptr[2]] = 0

    assert check_raw(cells(matrix)).n_empty == 3
    assert check_raw(cells(sp.csr_matrix((4, 40)))).n_empty == 4


def test_rounded_logarithms_are_suspected() -> None:
    """Whole numbers without ones and without a tail are answered with a warning."""
    random = np.random.default_rng(0)
    rounded = sp.csr_matrix(np.rint(np.log1p(random.lognormal(4, 1, (60, 40)))))

    assert "rounded" in check_raw(cells(rounded)).warnings[0]


def test_reads_are_suspected() -> None:
    """A median of reads, not molecules, is answered with a warning."""
    assert "reads" in check_raw(cells(counts(9) * 10_000)).warnings[0]
