"""The check that values are raw counts."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.counts import MAX_EXACT, Cells, check_raw, row_sums, some_rows, stacked
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


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_first_wrong_value_is_the_first(data: st.DataObject) -> None:
    """Among any wrong values the one that is named is the first in the order of cells, and those of its cell are counted."""
    n_cells, n_genes = data.draw(st.integers(1, 6)), 5
    places = data.draw(st.sets(st.tuples(st.integers(0, n_cells - 1), st.integers(0, n_genes - 1)), min_size=1))
    filled = data.draw(st.sets(st.tuples(st.integers(0, n_cells - 1), st.integers(0, n_genes - 1))))
    dense = np.zeros((n_cells, n_genes))
    for at in filled:
        dense[at] = 3
    for at in places:
        dense[at] = data.draw(st.sampled_from([-1, -0.5]))
    with pytest.raises(NotRawCounts) as refused:
        check_raw(Cells(genes=GENES[:n_genes], counts=sp.csr_matrix(dense)))

    row, column = np.argwhere(dense < 0)[0]
    assert (refused.value.cell, refused.value.gene) == (f"Cell {row}", GENES[column])
    assert refused.value.n_values == (dense[row] < 0).sum()


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64, np.float32, np.float64])
def test_integers_beyond_float32(dtype: type) -> None:
    """A count over 2**24 is refused in every type that can hold it, an integer as an integer."""
    matrix = counts(3).astype(dtype)
    matrix.data[-1] = MAX_EXACT + 2
    with pytest.raises(NotRawCounts, match=r"^Cell 2 has 1 over 16,777,216 value\(s\)"):
        check_raw(cells(matrix))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_negative_integers(dtype: type) -> None:
    """Negative counts are refused in signed integers too, down to the smallest."""
    matrix = counts(3).astype(dtype)
    matrix.data[5] = np.iinfo(dtype).min
    with pytest.raises(NotRawCounts, match="negative"):
        check_raw(cells(matrix))


def test_the_worst_is_said_first() -> None:
    """A value that is not finite is named even where an earlier one is negative or fractional."""
    matrix = counts(3)
    matrix.data[:3] = (0.5, -1, np.nan)
    with pytest.raises(NotRawCounts, match="not finite"):
        check_raw(cells(matrix))
    matrix.data[2] = 1
    with pytest.raises(NotRawCounts, match="negative"):
        check_raw(cells(matrix))


def test_one_in_a_million() -> None:
    """One NaN among a million cells is found and named."""
    n_cells = 1_000_000
    data = np.ones(n_cells, dtype=np.float32)
    data[765_432] = np.nan
    matrix = sp.csr_matrix((data, np.zeros(n_cells, np.int32), np.arange(n_cells + 1)), shape=(n_cells, 40))
    with pytest.raises(NotRawCounts, match=r"^Cell 765432 has 1 not finite value"):
        check_raw(cells(matrix))


def test_empty_cells_before_the_wrong_one() -> None:
    """Cells without values are counted on the way to the first wrong one."""
    matrix = sp.vstack([sp.csr_matrix((3, 40)), -counts(1), sp.csr_matrix((2, 40))], format="csr")
    with pytest.raises(NotRawCounts, match=r"^Cell 3 "):
        check_raw(cells(matrix))


def test_zero_in_every_form() -> None:
    """Stored zeros, also negative ones, are no counts and nothing wrong."""
    matrix = counts(2).astype(np.float64)
    matrix.data[:] = -0.0
    assert check_raw(cells(matrix)).n_empty == 2


@pytest.mark.parametrize("depth", [300, 3_000, 30_000])
def test_true_counts_are_not_suspected(depth: int) -> None:
    """Cells of a negative binomial, shallow to deep, get no warning; neither do a few cells with small counts."""
    random = np.random.default_rng(0)
    mean = random.lognormal(0, 2, 400)
    rate = random.gamma(1, mean / mean.sum() * depth, (50, 400))
    matrix = sp.csr_matrix(random.poisson(rate).astype(np.float32))
    report = check_raw(Cells(genes=tuple(f"G{number}" for number in range(400)), counts=matrix))

    assert report.warnings == ()
    assert report.as_dict() == {"n_cells": 50, "n_empty": report.n_empty, "warnings": []}


def test_long_names_are_cut() -> None:
    """Names of any length leave the message short."""
    matrix = sp.csr_matrix(np.array([[-1.0]]))
    with pytest.raises(NotRawCounts) as refused:
        check_raw(Cells(genes=("g" * 256,), counts=matrix, cell_ids=("c" * 256,)))
    assert len(str(refused.value)) < 300


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_rows_taken_and_stacked_are_those_rows(sizes: list[int], seed: int) -> None:
    """Whatever is cut out and put together again holds the same counts as scipy's own, and the right sums."""
    generator = np.random.default_rng(seed)
    matrix = sp.random(sum(sizes) + 1, 7, density=0.4, format="csr", random_state=generator, dtype=np.float32)
    ends = np.cumsum([0, *sizes])
    parts = [some_rows(matrix, start, stop) for start, stop in itertools.pairwise(ends)]
    joined = stacked([*parts, matrix])

    expected = sp.vstack([matrix[: ends[-1]], matrix], format="csr")
    np.testing.assert_array_equal(joined.toarray(), expected.toarray())
    np.testing.assert_array_equal(row_sums(joined), row_sums(expected))
    for part, start, stop in zip(parts, ends[:-1], ends[1:], strict=True):
        np.testing.assert_array_equal(row_sums(part), row_sums(matrix[start:stop]))


def test_sums_are_added_up_once() -> None:
    """They stay with the matrix, and nobody can change them by mistake."""
    matrix = sp.csr_matrix(np.array([[1, 2], [0, 3]], dtype=np.uint8))
    sums = row_sums(matrix)

    assert row_sums(matrix) is sums
    with pytest.raises(ValueError, match="read-only"):
        sums[0] = 1
