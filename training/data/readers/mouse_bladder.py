"""mouse_bladder: Microwell-seq counts without gene names, for tests and speed."""

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData


def read_mouse_bladder(files: Mapping[str, Path]) -> AnnData:
    """2,100 cells; the 16 clusters are numbers, and genes are called gene_0 … gene_20669."""
    with h5py.File(files["mouse_bladder_cell_select_2100.h5"]) as file:
        counts, clusters = file["X"][:], file["Y"][:]
    names = [f"gene_{i}" for i in range(counts.shape[1])]
    obs = pd.DataFrame(
        {"batch": "mouse_bladder", "cell_type_original": clusters.astype(int).astype(str), "published_split": "train"},
        index=[f"cell_{i}" for i in range(len(counts))],
    )
    var = pd.DataFrame({"gene_id": "", "gene_symbol": names}, index=names)
    return AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
