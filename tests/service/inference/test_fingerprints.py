"""Keys of cells: equal for equal counts, whatever form they came in, and for nothing else."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from service.cells.counts import csr
from service.inference.fingerprints import BLOCK_ROWS, Words, fingerprints, model_prefix
from tests.builders import counts

N_GENES = 40
WORDS = Words()


def keys(matrix: sp.csr_matrix, question: str = "embed", model_number: int = 7) -> list[bytes]:
    return fingerprints(matrix, WORDS.of_genes(matrix.shape[1]), WORDS.of_text(question), model_number)


@given(seed=st.integers(0, 1000))
def test_the_form_leaves_no_trace(seed: int) -> None:
    """Genes in another order, counts split over entries of one gene, and explicit zeros do not change a key."""
    random = np.random.default_rng(seed)
    matrix = counts(5, N_GENES, seed)
    data, indices, indptr = [], [], [0]
    for row in matrix:
        first = np.floor(row.data / 2)
        some = np.concatenate([first, row.data - first, np.zeros(4)])
        at = np.concatenate([row.indices, row.indices, random.integers(0, N_GENES, 4)])
        order = random.permutation(len(some))
        data.append(some[order])
        indices.append(at[order])
        indptr.append(indptr[-1] + len(some))
    other = csr(np.concatenate(data).astype(np.float32), np.concatenate(indices), np.array(indptr), N_GENES)

    assert (other.toarray() == matrix.toarray()).all()
    assert other.nnz > matrix.nnz
    assert keys(other) == keys(matrix)


def test_a_cell_has_its_key_in_any_company() -> None:
    """Alone or in one of several blocks."""
    matrix = counts(2 * BLOCK_ROWS + 3)

    assert keys(matrix) == [key for row in range(matrix.shape[0]) for key in keys(matrix[row])]


@pytest.mark.parametrize("largest", [1.0, 2.0**24])
def test_cells_that_differ_in_one_count(largest: float) -> None:
    """One count more or less, in any gene, at any size, is another key; so is the empty cell."""
    matrix = np.zeros((2 * N_GENES + 1, N_GENES), dtype=np.float32)
    matrix[:N_GENES] = np.eye(N_GENES) * largest
    matrix[N_GENES:-1] = np.eye(N_GENES) * (largest + 2)

    assert len(set(keys(sp.csr_matrix(matrix)))) == len(matrix)


def test_the_question_is_part_of_the_key() -> None:
    """Another task, other options, another model."""
    cell = counts(1)
    found = [*keys(cell), *keys(cell, "annotate"), *keys(cell, model_number=8)]

    assert len(set(found)) == 3
    assert found[0].startswith(model_prefix(7))
    assert {len(key) for key in found} == {40}


def test_words_are_secret_and_stay() -> None:
    """Another process has other words; more genes do not change those that there are."""
    words = Words()
    few = words.of_genes(3).copy()

    assert (words.of_genes(1000)[:3] == few).all()
    assert len(np.unique(words.of_genes(1000))) == 4000
    assert (Words().of_genes(3) != few).all()
    assert (Words().of_text("x") != words.of_text("x")).all()
