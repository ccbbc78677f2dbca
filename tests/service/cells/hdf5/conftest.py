"""A pool of processes, and a small file with counts in three places."""

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from service.cells.file_processes import FileProcesses
from tests.builders import counts, gene_table


@pytest.fixture(scope="module")
def processes() -> Iterator[FileProcesses]:
    """Processes that end with the tests of a file."""
    pool = FileProcesses()
    yield pool
    pool.close()


@pytest.fixture
def adata() -> ad.AnnData:
    """Seven cells with raw counts in X, over the genes of the tiny model."""
    made = ad.AnnData(counts(7))
    made.var_names = list(gene_table().gene_symbol)
    made.var["gene_id"] = list(gene_table().gene_id)
    made.obs_names = [f"cell-{number}" for number in range(7)]
    return made


@pytest.fixture
def path(adata: ad.AnnData, tmp_path: Path) -> Path:
    """The file of these cells."""
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def logged(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """What log-normalisation makes of counts."""
    return sp.csr_matrix(np.log1p(matrix.toarray() / np.maximum(matrix.sum(axis=1), 1) * 1e4))
