"""Gene selection: from training cells only, by a named rule."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from tests.training.tiny import tiny_cells, tiny_config
from training.data.features import RULES, NoGenes, TrainingCells, select_genes, select_named
from training.data.prepared import prepare
from training.data.reference import join
from training.data.splits import TRAIN, Split


def training_cells(n_cells: int = 300, n_genes: int = 400, seed: int = 0) -> TrainingCells:
    """Poisson counts in two batches and two classes; genes 0 to 9 differ between the classes."""
    generator = np.random.default_rng(seed)
    label = generator.integers(2, size=n_cells)
    mean = generator.gamma(2.0, 1.0, n_genes) * np.ones((n_cells, 1))
    mean[:, :10] *= np.where(label[:, None] == 1, 6.0, 0.2)
    return TrainingCells(sp.csr_matrix(generator.poisson(mean).astype(np.float32)), np.arange(n_cells) % 2, label)


def test_log_variance_finds_the_genes_that_vary() -> None:
    """Of 400 genes the ten that differ between classes are among the first twenty."""
    assert set(range(10)) <= set(select_genes(training_cells(), "log_variance", 20, 0))


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_cells_does_not_matter(rule: str) -> None:
    """A selection is of a set of cells."""
    cells = training_cells()
    order = np.random.default_rng(1).permutation(len(cells.batch))
    shuffled = TrainingCells(cells.counts[order], cells.batch[order], cells.label[order])
    np.testing.assert_array_equal(select_genes(shuffled, rule, 30, 0), select_genes(cells, rule, 30, 0))


def test_seurat_rule_is_scanpys() -> None:
    """The same genes as scanpy.pp.highly_variable_genes with batch_key."""
    cells = training_cells()
    obs = pd.DataFrame({"batch": pd.Categorical(cells.batch)}, index=[str(i) for i in range(300)])
    table = ad.AnnData(cells.counts.copy(), obs=obs)
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    sc.pp.highly_variable_genes(table, n_top_genes=20, batch_key="batch")
    expected = np.flatnonzero(table.var["highly_variable"])
    found = select_genes(cells, "seurat", 20, 0)
    assert (
        len(set(found) & set(expected)) >= 19
    )  # scanpy breaks ties by median rank, of which we know only the mean dispersion


def test_rare_genes_are_left_out() -> None:
    """A gene must be seen in min_cells training cells of every batch."""
    cells = training_cells()
    counts = cells.counts.tolil()
    counts[:, 0] = 0
    counts[::2, 1] = 0
    assert not {0, 1} & set(select_genes(cells._replace(counts=counts.tocsr()), "log_variance", 100, 3))


def test_held_out_cells_have_no_say() -> None:
    """Changing every cell but the training cells changes neither the genes nor their statistics."""
    config = tiny_config()
    reference = join({name: tiny_cells(name) for name in config.data})
    part = {name: TRAIN if i % 2 else "test" for i, name in enumerate(reference.obs_names)}
    part |= dict.fromkeys(list(part)[:4], "validation")
    changed = reference.copy()
    others = np.array([part[name] != TRAIN for name in changed.obs_names])
    dense = changed.X.toarray()
    dense[others] = np.random.default_rng(0).poisson(50, dense[others].shape)
    changed.X = sp.csr_matrix(dense)
    before, after = (prepare(config, cells, Split(part)) for cells in (reference, changed))
    assert list(before.var.index) == list(after.var.index)
    np.testing.assert_array_equal(before.statistics.mean, after.statistics.mean)
    np.testing.assert_array_equal(before.statistics.std, after.statistics.std)


def test_statistics_are_those_of_the_transformed_counts() -> None:
    """Mean and deviation of ln(1 + counts per target_sum) as numpy gives them."""
    config = tiny_config(model={"hidden": [16], "n_latent": 4, "target_sum": 1000})
    reference = join({name: tiny_cells(name) for name in config.data})
    prepared = prepare(config, reference, Split(dict.fromkeys(reference.obs_names, TRAIN)))
    counts = prepared.train.counts.toarray()
    values = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1000)
    np.testing.assert_allclose(prepared.statistics.mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(prepared.statistics.std, values.std(axis=0), rtol=1e-4)
    assert prepared.statistics.n_cells["cell_type"].sum() == reference.n_obs


def test_seurat_v3_rule_is_scanpys() -> None:
    """The same genes as scanpy.pp.highly_variable_genes with batch_key."""
    cells = training_cells()
    obs = pd.DataFrame({"batch": pd.Categorical(cells.batch)}, index=[str(i) for i in range(300)])
    table = ad.AnnData(cells.counts.copy(), obs=obs)
    sc.pp.highly_variable_genes(table, n_top_genes=20, batch_key="batch", flavor="seurat_v3")
    np.testing.assert_array_equal(select_genes(cells, "seurat_v3", 20, 0), np.flatnonzero(table.var["highly_variable"]))


def test_variance_rule_takes_the_highest_variances() -> None:
    """Those of numpy; and min_variance is a bound on them."""
    cells = training_cells()
    variance = cells.counts.toarray().astype(np.float64).var(axis=0)
    np.testing.assert_array_equal(select_genes(cells, "variance", 30, 0), np.sort(np.argsort(-variance)[:30]))
    bound = np.median(variance)
    np.testing.assert_array_equal(select_genes(cells, "variance", 400, 0, bound), np.flatnonzero(variance >= bound))
    with pytest.raises(NoGenes, match=r"genes\.min_variance"):
        select_genes(cells, "variance", 400, 0, 1e9)


def test_genes_by_name() -> None:
    """By id or symbol, in the order of the data; all that are missing are named."""
    var = tiny_cells("tiny_a").var
    np.testing.assert_array_equal(select_named(var, ("G7", "ENSG00000000003", "G7")), [3, 7])
    with pytest.raises(NoGenes, match=r"2 of 3 genes of genes\.names: X, Y"):
        select_named(var, ("X", "G1", "Y"))
    config = tiny_config(genes={"rule": "names", "names": ["G5", "G1"]})
    reference = join({name: tiny_cells(name) for name in config.data})
    prepared = prepare(config, reference, Split(dict.fromkeys(reference.obs_names, TRAIN)))
    assert list(prepared.var["gene_symbol"]) == ["G1", "G5"]


def test_genes_are_ranked_on_a_sample_of_many_cells() -> None:
    """The sample's size has an effect, and is as good as nothing where it is large."""
    reference = join({name: tiny_cells(name) for name in ("tiny_a", "tiny_b")})
    split = Split(dict.fromkeys(reference.obs_names, TRAIN))

    def genes(sample: int) -> list[str]:
        config = tiny_config(genes={"rule": "log_variance", "n_genes": 20, "min_cells": 1, "sample": sample})
        return list(prepare(config, reference, split).var.index)

    assert genes(240) == genes(10**6) != genes(40)
