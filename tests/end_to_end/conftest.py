"""One server of the shipped models for the tests that only ask it things; and real cells to send."""

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from service.contract import artifact
from service.contract.artifact import Artifact
from service.contract.store import Store
from tests.end_to_end.server import ROOT, Server

STORE = ROOT / "models_store"
VERSION = Store(STORE).resolve("pbmc").version
"""Of the shipped model."""


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A ready server of models_store/."""
    running = Server(STORE)
    try:
        yield running.start().wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session")
def shipped() -> Artifact:
    """The shipped model as it lies in the store."""
    store = Store(STORE)
    return artifact.read(store.path(store.resolve("pbmc")))


@pytest.fixture(scope="session")
def cells(shipped: Artifact) -> ad.AnnData:
    """The golden cells of the shipped model, real and held out, over its genes; the empty one is left out."""
    counts = shipped.golden()["encode/counts"]
    filled = counts[counts.sum(axis=1) > 0]
    adata = ad.AnnData(sp.csr_matrix(filled))
    adata.var_names = list(shipped.genes.gene_symbol)
    adata.var["gene_id"] = list(shipped.genes.gene_id)
    adata.obs_names = [f"cell-{number}" for number in range(len(filled))]
    return adata


def many(cells: ad.AnnData, n_cells: int) -> sp.csr_matrix:
    """`n_cells` cells made of the given ones: each with its own random share of the counts, so that they differ."""
    random = np.random.default_rng(0)
    counts = sp.csr_matrix(cells.X)[random.integers(0, cells.n_obs, n_cells)]
    counts.data = random.binomial(counts.data.astype(int), random.uniform(0.3, 1)).astype(np.float32)
    counts.eliminate_zeros()
    return counts


@pytest.fixture
def tiny_store(tmp_path: Path) -> Path:
    """A store with one tiny model of two versions; `default` is the first."""
    from tests.builders import write_artifact

    write_artifact(tmp_path / "store", version="1")
    write_artifact(tmp_path / "store", version="2", seed=5)
    store = Store(tmp_path / "store")
    store.set_alias(store.resolve("tiny@1"))
    return tmp_path / "store"
