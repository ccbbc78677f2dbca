"""pbmc_facs: 10x blood cells that were sorted before they were sequenced (Zheng et al. 2017, doi:10.1038/ncomms14049)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from training.data.readers.rdata_file import read_rdata

BROAD = {
    "CD19+ B": "B",
    "CD14+ Monocyte": "Monocyte",
    "CD34+": "CD34+ progenitor",
    "CD56+ NK": "NK",
    "CD4+ T Helper2": "CD4 T",
    "CD4+/CD45RO+ Memory": "CD4 T",
    "CD4+/CD45RA+/CD25- Naive T": "CD4 T",
    "CD4+/CD25 T Reg": "CD4 T",
    "CD8+ Cytotoxic T": "CD8 T",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8 T",
}


def read_pbmc_facs(files: Mapping[str, Path]) -> AnnData:
    """3,774 cells and, marked "test" in `published_split`, the 100 cells that their publishers set apart."""
    published = read_rdata(files["pbmc_facs.RData"])["pbmc_facs"]
    samples = pd.concat([published["samples"], published["samples_test"]])
    split = np.repeat(["train", "test"], [len(published["samples"]), len(published["samples_test"])])
    original = samples["celltype"].astype(str).to_numpy()
    obs = pd.DataFrame(
        {
            "batch": "pbmc_facs",
            "cell_type": [BROAD[label] for label in original],
            "cell_type_original": original,
            "published_split": split,
        },
        # Barcodes repeat between the sorted samples, so a running number makes them unique.
        index=[f"{barcode}-{i}" for i, barcode in enumerate(samples["barcode"].astype(str))],
    )
    gene_id = published["genes"]["ensembl"].astype(str).to_numpy(dtype=object)
    symbol = published["genes"]["symbol"].astype(str).to_numpy(dtype=object)
    counts = sp.vstack([published["counts"].values, published["counts_test"].values], format="csr")
    var = pd.DataFrame({"gene_id": gene_id, "gene_symbol": symbol}, index=gene_id)
    return AnnData(counts.astype(np.float32), obs=obs, var=var)
