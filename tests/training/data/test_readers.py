"""Readers of the published sets: shapes, labels and counts as they were published."""

import numpy as np
import pytest
import scipy.sparse as sp

from tests.training.tiny import read_or_skip
from training.data.readers import READERS, pbmc3k
from training.data.registry import DATASETS

SHAPES = {
    "pbmc_facs": (3874, 16791),
    "pbmc3k": (2638, 13714),
    "cell_lines": (1408, 28517),
    "cite_seq": (400, 15792),
    "mouse_bladder": (2100, 20670),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_gives_raw_counts_and_names(name: str) -> None:
    """CSR float32 of whole numbers, unique names, and the columns that the rest relies on."""
    cells = read_or_skip(name)
    assert cells.shape[0] == SHAPES[name][0]
    assert cells.shape[1] <= 28517
    assert sp.isspmatrix_csr(cells.X)
    assert cells.X.dtype == np.float32
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.X.data.min() >= 0
    assert cells.obs_names.is_unique
    assert cells.var_names.is_unique
    assert {"gene_id", "gene_symbol"} <= set(cells.var)
    assert {"batch", "cell_type_original", "published_split"} <= set(cells.obs)


def test_every_reader_belongs_to_a_data_set() -> None:
    """The two tables agree."""
    assert {dataset.reader for dataset in DATASETS.values() if dataset.reader} == set(READERS)


def test_pbmc_facs_keeps_the_published_test_cells_apart() -> None:
    """100 cells are marked; ten sorted types fall into six broad ones; 714 non-zero counts per cell."""
    cells = read_or_skip("pbmc_facs")
    assert cells.shape == SHAPES["pbmc_facs"]
    assert (cells.obs["published_split"] == "test").sum() == 100
    assert cells.obs["cell_type_original"].nunique() == 10
    assert set(cells.obs["cell_type"]) == {"B", "CD4 T", "CD8 T", "NK", "Monocyte", "CD34+ progenitor"}
    published = cells[cells.obs["published_split"] == "train"]
    assert round(published.X.nnz / published.n_obs) == 716
    assert cells.var["gene_id"].str.fullmatch(r"ENSG\d{11}").all()


def test_pbmc3k_counts_are_restored() -> None:
    """Each cell's counts sum to at most what Seurat counted (genes were filtered), and log-normalise back to what was published."""
    cells = read_or_skip("pbmc3k")
    assert cells.shape == SHAPES["pbmc3k"]
    # The first cell of the tutorial: 2,419 counts, of which 1 is a count of CD3E's neighbour … of 779 genes.
    first = cells["AAACATACAACCAC"].X
    assert first.sum() == 2419
    assert first.nnz == 779
    assert dict(cells.obs["cell_type"].value_counts()) == {
        "CD4 T": 1180, "Monocyte": 642, "B": 344, "CD8 T": 271, "NK": 155, "Dendritic": 32, "Platelet": 14,
    }  # fmt: skip


def test_restoring_undoes_the_normalisation() -> None:
    """Counts that are normalised and restored are the same counts."""
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (20, 30)).astype(float))
    library = np.asarray(counts.sum(axis=1)).ravel()
    normalised = sp.csr_matrix(sp.diags(1e4 / library) @ counts).log1p()
    np.testing.assert_array_equal(pbmc3k.restore_counts(normalised, library).toarray(), counts.toarray())


def test_counts_that_cannot_be_restored_are_refused() -> None:
    """With library sizes of other cells the result is not whole."""
    with pytest.raises(pbmc3k.CountsNotRestored, match="away from an integer"):
        pbmc3k.restore_counts(sp.csr_matrix(np.log1p([[5.0, 2.5]])), np.array([9_999.0]))
    with pytest.raises(pbmc3k.CountsNotRestored):
        pbmc3k.restore_counts(sp.csr_matrix([[np.nan]]), np.array([1.0]))


def test_cell_lines_know_their_line_and_plate() -> None:
    """Five batches, five lines."""
    cells = read_or_skip("cell_lines")
    assert cells.obs["batch"].nunique() == 5
    assert {"H1975", "H2228", "HCC827", "H838", "A549"} <= set(cells.obs["cell_type_original"])


def test_cite_seq_proteins_are_matched_by_name() -> None:
    """14 antibodies are common; CD3 and CD19 exclude each other in both batches, which they would not if columns were mixed up."""
    cells = read_or_skip("cite_seq")
    protein = cells.obsm["protein_counts"]
    assert protein.shape == (400, 14)
    for batch in cells.obs["batch"].unique():
        of_batch = protein[(cells.obs["batch"] == batch).to_numpy()]
        cd3 = of_batch["CD3_TotalSeqB"] > of_batch["CD3_TotalSeqB"].median()
        cd19 = of_batch["CD19_TotalSeqB"] > of_batch["CD19_TotalSeqB"].quantile(0.9)
        assert not (cd3 & cd19).mean() > 0.02
