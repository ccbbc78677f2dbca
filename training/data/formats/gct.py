"""GCT 1.2, as GTEx publishes counts: genes x samples with an id and a name for each gene, .gz or not."""

import gzip
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from training.data.formats.errors import BadFile

EXPECTED = "GCT: '#1.2', the numbers of genes and samples, then a table with Name and Description"
_ROWS = 1024


def read_gct(path: Path) -> ad.AnnData:
    """All samples; versions are taken off Ensembl ids."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        version, shape = file.readline().strip(), file.readline().split()
    if version != "#1.2" or len(shape) < 2 or not all(number.isdigit() for number in shape[:2]):
        raise BadFile(path, EXPECTED, f"{version[:40]!r} and then {' '.join(shape)[:40]!r}")
    n_genes, n_samples = int(shape[0]), int(shape[1])
    blocks, names, symbols, samples = [], [], [], []
    with pd.read_csv(path, sep="\t", skiprows=2, chunksize=_ROWS, dtype={"Name": str, "Description": str}) as reader:
        for block in reader:
            if missing := [name for name in ("Name", "Description") if name not in block]:
                raise BadFile(path, EXPECTED, f"no column {', '.join(missing)}")
            samples = [name for name in block.columns if name not in ("Name", "Description", "id")]
            values = block[samples]
            if not all(kind.kind in "iuf" for kind in values.dtypes) or values.isna().any(axis=None):
                raise BadFile(
                    path,
                    EXPECTED,
                    f"no number somewhere between genes {len(names) + 1:,} and {len(names) + len(block):,}",
                )
            blocks.append(sp.csr_matrix(values.to_numpy(dtype=np.float32)))
            names += block["Name"].tolist()
            symbols += block["Description"].fillna("").tolist()
    if (len(names), len(samples)) != (n_genes, n_samples):
        raise BadFile(
            path, f"{n_genes:,} genes x {n_samples:,} samples, as line 2 says", f"{len(names):,} x {len(samples):,}"
        )
    counts = sp.vstack(blocks, format="csr").T.tocsr()
    var = pd.DataFrame({"gene_id": [name.split(".")[0] for name in names], "gene_symbol": symbols}, index=names)
    return ad.AnnData(counts, obs=pd.DataFrame(index=[str(name) for name in samples]), var=var)
