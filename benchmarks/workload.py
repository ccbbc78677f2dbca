"""Real cells of a wanted number of genes, and one and the same trained network for every side of a comparison.

The network is an SCVI of scvi-tools' default size (128 hidden units, 10 latent units). scvi-tools trains and saves it, `python -m training
import scvi` turns it into an artifact and compares its answers with those of scvi-tools, and every server runs the graph of that artifact.
It is trained for one epoch: how fast a network is does not depend on how good it is. All of it is kept in .cache/benchmarks.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from service.client import bodies
from service.contract.store import Store
from training.data import registry
from training.data.features import variance_of
from training.importers.scvi_artifact import Import, import_scvi

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache/benchmarks"
SCVI_PYTHON = "CELLSERVE_BENCH_PYTHON"
"""Environment variable with the interpreter that has scvi-tools."""

DATA = {2_000: "pbmc_facs", 8_000: "pbmc_facs", 20_000: "mouse_bladder"}
"""Data set by number of genes: blood cells have 16,791 genes, so 20,000 need another set."""

N_CELLS = 8_192
N_HIDDEN, N_LATENT = 128, 10
NAME, INT8 = "bench", "bench-int8"


@dataclass(frozen=True)
class Cells:
    """What is sent."""

    counts: sp.csr_matrix
    """Raw counts, float32 of shape (n_cells, n_genes), in the order of the network's genes."""

    genes: list[str]
    """Names of the columns."""

    def pieces(self, size: int, n_pieces: int) -> list[sp.csr_matrix]:
        """The first cells in pieces of `size`."""
        return [self.counts[start : start + size] for start in range(0, size * n_pieces, size)]

    def arrow(self, size: int, n_pieces: int) -> list[bytes]:
        """The same as Arrow bodies, as our client sends them."""
        return [next(bodies(piece, self.genes, size)) for piece in self.pieces(size, n_pieces)]

    def dense(self, size: int, n_pieces: int) -> list[NDArray[np.float32]]:
        """The same as matrices."""
        return [piece.toarray() for piece in self.pieces(size, n_pieces)]


@dataclass(frozen=True)
class Workload:
    """Cells and the network that embeds them."""

    folder: Path
    data: str

    @property
    def file(self) -> Path:
        """The cells."""
        return self.folder / "cells.h5ad"

    @property
    def scvi(self) -> Path:
        """What `model.save` of scvi-tools wrote."""
        return self.folder / "scvi"

    @property
    def store(self) -> Path:
        """A store with the network as its only model."""
        return self.folder / "store"

    def int8_store(self) -> Path:
        """A store with the same network in 8 bits as its only model, from the cache or made now."""
        root = self.folder / "store_int8"
        if not Store(root).versions(INT8):
            import_scvi(self.scvi, Import(name=NAME, species="none", cells=self.file, precision="int8"), root)
        return root

    @property
    def graph(self) -> Path:
        """The encoder of the artifact, which all servers run."""
        store = Store(self.store)
        return store.path(store.resolve(NAME)) / "encode.onnx"

    def cells(self) -> Cells:
        """The cells, read."""
        table = ad.read_h5ad(self.file)
        return Cells(sp.csr_matrix(table.X), [str(name) for name in table.var_names])


def workload(n_genes: int) -> Workload:
    """The workload of that many genes, from the cache or made now (about a minute).

    Raises:
        KeyError: no data set is set down for that number.
    """
    found = Workload(CACHE / str(n_genes), DATA[n_genes])
    if not found.file.exists():
        found.folder.mkdir(parents=True, exist_ok=True)
        choose_cells(found.data, n_genes).write_h5ad(found.file)
    python = Path(os.environ[SCVI_PYTHON]).absolute()
    if not found.scvi.exists():
        script = Path(__file__).with_name("scvi_model.py")
        subprocess.run([python, script, found.file, found.scvi, str(N_HIDDEN), str(N_LATENT)], check=True)
    if not Store(found.store).versions(NAME):
        import_scvi(found.scvi, Import(name=NAME, species="none", cells=found.file, scvi_python=python), found.store)
    return found


def choose_cells(data: str, n_genes: int) -> ad.AnnData:
    """N_CELLS cells, repeated where there are fewer, over the genes of highest variance of log counts."""
    counts = sp.csr_matrix(registry.read(data).X, dtype=np.float32)
    logged = counts.copy()
    logged.data = np.log1p(logged.data)
    chosen = np.sort(np.argsort(-variance_of(logged), kind="stable")[:n_genes])
    counts = counts[:, chosen]
    counts = counts[np.asarray(counts.sum(axis=1)).ravel() > 0]
    counts = counts[np.arange(N_CELLS) % counts.shape[0]]
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(N_CELLS)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{number}" for number in range(n_genes)]))
