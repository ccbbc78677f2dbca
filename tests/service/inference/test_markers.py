"""Markers: scanpy's numbers, laws, and groups that are too small."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from service.inference import markers
from service.inference.markers import Ranking, false_discovery_rate, log_normalised, rank_genes
from tests.builders import counts

METHODS = {"t_test": "t-test", "wilcoxon": "wilcoxon"}


def grouped(n_cells: int = 240, n_genes: int = 60) -> tuple[sp.csr_matrix, np.ndarray]:
    """Counts of three groups, in which a third of the genes each is higher; and a gene that no cell has."""
    random = np.random.default_rng(1)
    group = random.integers(0, 3, n_cells).astype(np.int32)
    mean = random.gamma(0.5, 1.0, n_genes)[None, :] * np.where(np.arange(n_genes)[None, :] % 3 == group[:, None], 3, 1)
    found = random.poisson(mean).astype(np.float32)
    found[:, 7] = 0
    return sp.csr_matrix(found), group


def by_scanpy(matrix: sp.csr_matrix, group: np.ndarray, test: str) -> Ranking:
    """The same figures, by `scanpy.tl.rank_genes_groups`; of our values, as scanpy's round twice and so break some ties of equal shares."""
    adata = ad.AnnData(sp.csr_matrix(matrix, dtype=np.float64))
    adata.obs["group"] = [str(number) for number in group]
    adata.obs["group"] = adata.obs["group"].astype("category")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(adata.X.toarray(), log_normalised(matrix).toarray(), rtol=1e-12)
    adata.X = log_normalised(matrix)
    sc.tl.rank_genes_groups(adata, "group", method=METHODS[test], tie_correct=True, pts=True)
    tables = []
    for name in adata.obs["group"].cat.categories:
        table = sc.get.rank_genes_groups_df(adata, name).set_index("names").loc[adata.var_names]
        tables.append(table)
    columns = ("scores", "pvals", "pvals_adj", "logfoldchanges", "pct_nz_group", "pct_nz_reference")
    arrays = [np.array([table[column].to_numpy() for table in tables]) for column in columns]
    return Ranking(*arrays, is_tested=np.ones(len(tables), dtype=bool))


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # scanpy's own, at a gene that no cell has
@pytest.mark.parametrize("test", METHODS)
def test_scanpy_says_the_same(test: str) -> None:
    """Scores, p-values, adjusted p-values, fold changes and shares agree; scanpy keeps scores and fold changes in float32."""
    matrix, group = grouped()
    ours, theirs = rank_genes(matrix, group, 3, test), by_scanpy(matrix, group, test)

    np.testing.assert_allclose(ours.score, theirs.score, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(ours.p_value, theirs.p_value, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(ours.q_value, theirs.q_value, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(ours.share_in, theirs.share_in, rtol=1e-6)
    np.testing.assert_allclose(ours.share_rest, theirs.share_rest, rtol=1e-6)
    is_there = np.arange(60) != 7
    np.testing.assert_allclose(ours.log2_fold_change[:, is_there], theirs.log2_fold_change[:, is_there], atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n_cells=st.integers(8, 40))
def test_ranks_with_ties(seed: int, n_cells: int) -> None:
    """Z and p are those of scipy's Mann-Whitney test with ties and without continuity, gene by gene."""
    matrix = counts(n_cells, 6, seed=seed)
    group = np.random.default_rng(seed).permutation(np.arange(n_cells) % 2).astype(np.int32)
    values = log_normalised(matrix).toarray()
    found = rank_genes(matrix, group, 2, "wilcoxon")
    for gene in range(6):
        if np.ptp(values[:, gene]) == 0:
            assert found.p_value[0, gene] == 1
            continue
        expected = stats.mannwhitneyu(
            values[group == 0, gene], values[group == 1, gene], use_continuity=False, method="asymptotic"
        )
        assert found.p_value[0, gene] == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-15)


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_rate(values: list[float]) -> None:
    """Adjusted p-values are scipy's."""
    p_value = np.array(values)
    np.testing.assert_allclose(false_discovery_rate(p_value), stats.false_discovery_control(p_value), rtol=1e-12)


@pytest.mark.parametrize("test", METHODS)
def test_order_of_cells_and_layout_leave_no_trace(test: str) -> None:
    """Shuffled cells, and a count that is written as two or with a stored zero, give the same figures."""
    matrix, group = grouped(60)
    first = rank_genes(matrix, group, 3, test)
    order = np.random.default_rng(0).permutation(60)
    shuffled = rank_genes(matrix[order], group[order], 3, test)
    half = sp.hstack([matrix, matrix], format="csr")
    half.indices = half.indices % 60
    twice = sp.csr_matrix((half.data / 2, half.indices, half.indptr), shape=matrix.shape)
    for other in (shuffled, rank_genes(twice, group, 3, test)):
        np.testing.assert_allclose(other.score, first.score, rtol=1e-9, atol=1e-9)


def test_equal_shares_are_tied() -> None:
    """Whatever the libraries are: n counts of n · 1,203 are the same for every n."""
    numbers = np.arange(1, 200)
    matrix = sp.csr_matrix(np.column_stack([numbers, numbers * 1_202]))
    assert len(np.unique(log_normalised(matrix).toarray()[:, 0])) == 1


@pytest.mark.parametrize("block", [1, 50, 300])
def test_genes_are_ranked_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many genes are taken at a time, the figures are the same bits."""
    matrix, group = grouped(60)
    whole = rank_genes(matrix, group, 3, "wilcoxon")
    monkeypatch.setattr(markers, "BLOCK_VALUES", block)
    np.testing.assert_array_equal(rank_genes(matrix, group, 3, "wilcoxon").score, whole.score)


@pytest.mark.parametrize("test", METHODS)
def test_small_groups_are_not_tested(test: str) -> None:
    """A group of two cells, an empty one, and one without others have no figures."""
    matrix, group = grouped(60)
    group = np.where(group == 2, 1, group).astype(np.int32)
    group[:2] = 2
    found = rank_genes(matrix, group, 4, test)
    assert found.is_tested.tolist() == [True, True, False, False]
    assert np.isfinite(found.score[:2]).all()
    assert np.isnan(found.score[2:]).all()
    assert not rank_genes(matrix, np.zeros(60, np.int32), 1, test).is_tested.any()


def test_empty_cells() -> None:
    """They have no share of anything, and disturb nothing."""
    matrix, group = grouped(60)
    dense = matrix.toarray()
    dense[0] = 0
    assert np.isfinite(rank_genes(sp.csr_matrix(dense), group, 3, "t_test").score).all()
