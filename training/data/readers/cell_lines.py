"""cell_lines: human lung cancer lines on five plates and two technologies (Tian et al. 2019, doi:10.1038/s41592-019-0425-8)."""

from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

COUNTS_SUFFIX = ".count.csv.gz"


def read_cell_lines(files: Mapping[str, Path]) -> ad.AnnData:
    """1,408 cells of five batches over the union of their genes; a gene that a batch lacks counts zero there."""
    batches = [name.removesuffix(COUNTS_SUFFIX) for name in files if name.endswith(COUNTS_SUFFIX)]
    parts = [_read_batch(files, batch) for batch in batches]
    cells = ad.concat(parts, join="outer", fill_value=0)
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    cells.var = pd.DataFrame({"gene_id": cells.var_names.to_numpy(), "gene_symbol": ""}, index=cells.var_names)
    return cells


def _read_batch(files: Mapping[str, Path], batch: str) -> ad.AnnData:
    table = pd.read_csv(files[f"{batch}{COUNTS_SUFFIX}"], index_col=0)
    meta = pd.read_csv(files[f"{batch}.metadata.csv.gz"], index_col=0).loc[table.columns]
    label = "cell_line" if "cell_line" in meta else "cell_line_demuxlet"
    obs = pd.DataFrame(
        {"batch": batch, "cell_type_original": meta[label].astype(str).to_numpy(), "published_split": "train"},
        index=[f"{batch}-{cell}" for cell in table.columns],
    )
    counts = sp.csr_matrix(table.to_numpy(dtype=np.float32).T)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=table.index.astype(str)))
