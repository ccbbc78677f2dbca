"""cite_seq: two sets of 10x blood cells with RNA and surface proteins."""

from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp


def read_cite_seq(files: Mapping[str, Path]) -> ad.AnnData:
    """400 cells of two batches over their common genes; `obsm["protein_counts"]` holds the common proteins by name.

    The two files list their antibodies in different orders, so proteins are matched by `uns["protein_names"]`.
    """
    parts = [_read_batch(path, name.removesuffix("_protein_v3.h5ad")) for name, path in files.items()]
    proteins = [part.obsm["protein_counts"] for part in parts]
    common = [name for name in proteins[0] if all(name in table for table in proteins)]
    for part, table in zip(parts, proteins, strict=True):
        part.obsm["protein_counts"] = table[common]
    cells = ad.concat(parts, join="inner")
    cells.var = pd.DataFrame({"gene_id": "", "gene_symbol": cells.var_names.to_numpy()}, index=cells.var_names)
    return cells


def _read_batch(path: Path, batch: str) -> ad.AnnData:
    # Read by key: the files are older than anndata's encoding metadata, of which its reader warns.
    with h5py.File(path) as file:
        counts = sp.csr_matrix(file["X"][:], dtype=np.float32)
        cells = [f"{batch}-{cell}" for cell in file["obs/index"].asstr()[:]]
        genes = pd.Index(file["var/index"].asstr()[:])
        protein = pd.DataFrame(
            file["obsm/protein_expression"][:], index=cells, columns=file["uns/protein_names"].asstr()[:]
        )
    obs = pd.DataFrame({"batch": batch, "cell_type_original": "", "published_split": "train"}, index=cells)
    part = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))
    part.obsm["protein_counts"] = protein
    return part
