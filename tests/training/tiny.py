"""Two tiny data sets, seeded, for tests that need cells but no particular ones: three types that differ in a third of the genes each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from training.config import Config
from training.data import registry
from training.data.readers import READERS

N_GENES, N_CELLS = 60, 120
TYPES = ("B", "NK", "CD4 T")
SETS = ("tiny_a", "tiny_b")
# Small enough for seconds, but with every part of a run in it.
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "species": "none",
    "data": list(SETS),
    "labels": [{"name": "cell_type", "classes": {"B": "CL:0000236", "NK": None, "CD4 T": None}}],
    "genes": {"rule": "log_variance", "n_genes": 40, "min_cells": 1},
    "family": "vae",
    "model": {"hidden": [16], "n_latent": 4},
    "fit": {"max_epochs": 3, "rows": 32, "device": "cpu"},
    # No picture: the compiler of umap-learn alone takes seconds.
    "export": {"n_golden": 4, "n_parity": 24, "reference": {"project": False}},
}


def tiny_config(**changes: Any) -> Config:
    """SETTINGS with top-level members replaced."""
    return Config.model_validate({**SETTINGS, **changes})


def tiny_cells(name: str) -> AnnData:
    """The cells of a tiny set; each set has another mean for every gene, as two chemistries have."""
    generator = np.random.default_rng(SETS.index(name))
    kind = generator.integers(len(TYPES), size=N_CELLS)
    mean = np.random.default_rng(9).gamma(1.0, 1.0, N_GENES) * generator.uniform(0.7, 1.4, N_GENES)
    factor = np.where(np.arange(N_GENES)[None, :] % len(TYPES) == kind[:, None], 4.0, 1.0)
    obs = pd.DataFrame(
        {"batch": name, "cell_type": [TYPES[k] for k in kind], "cell_type_original": "", "published_split": "train"},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    gene_id = [f"ENSG{i:011d}" for i in range(N_GENES)]
    var = pd.DataFrame({"gene_id": gene_id, "gene_symbol": [f"G{i}" for i in range(N_GENES)]}, index=gene_id)
    cells = AnnData(sp.csr_matrix(generator.poisson(mean * factor).astype(np.float32)), obs=obs, var=var)
    # One antibody per type, and the sets list them in another order.
    antibodies = [*TYPES] if name == SETS[0] else [*reversed(TYPES)]
    level = np.array([[20.0 if kind_name == TYPES[k] else 2.0 for kind_name in antibodies] for k in kind])
    cells.obsm["protein_counts"] = pd.DataFrame(generator.poisson(level), index=obs.index, columns=antibodies)
    return cells


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the tiny sets into the registry."""
    for name in SETS:

        def reader(files: Mapping[str, Path], name: str = name) -> AnnData:
            return tiny_cells(name)

        entry = registry.Dataset(name=name, summary="tiny", shape="tiny", licence="CC0", files=(), reader=name)
        monkeypatch.setitem(registry.DATASETS, name, entry)
        monkeypatch.setitem(READERS, name, reader)


def read_or_skip(name: str) -> AnnData:
    """A published data set; the test is skipped where it is neither cached nor to be had."""
    try:
        return registry.read(name)
    except registry.NetworkUnavailable as error:
        pytest.skip(str(error))
