"""Cell Ranger's outputs: .h5 (version 2 and 3) and the folder of matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv), as such or .gz."""

import csv
import gzip
from pathlib import Path
from typing import IO

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.io
import scipy.sparse as sp

from training.data.formats.errors import BadFile

EXPECTED_H5 = "Cell Ranger's .h5: a group with barcodes, data, indices, indptr, shape and features (version 3) or genes (version 2)"
EXPECTED_FOLDER = "Cell Ranger's folder: matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, as such or .gz"
GENE_EXPRESSION = "Gene Expression"


def read_cell_ranger_h5(path: Path) -> ad.AnnData:
    """The genes of all cells, with gene_id and gene_symbol; antibodies and other features are left out."""
    if not h5py.is_hdf5(path):
        raise BadFile(path, EXPECTED_H5, f"{path.stat().st_size:,} bytes that are not HDF5 (or a file cut short)")
    with h5py.File(path) as file:
        members = ("barcodes", "data", "indices", "indptr", "shape")
        groups = [group for group in file.values() if isinstance(group, h5py.Group)]
        if len(groups) != 1:
            raise BadFile(path, f"{EXPECTED_H5}, of one genome", f"{len(groups)} groups: {', '.join(file)}")
        names = (*members, "features") if "features" in groups[0] else (*members, "genes")
        if missing := [name for name in names if name not in groups[0]]:
            raise BadFile(path, EXPECTED_H5, f"no {', '.join(missing)} in {groups[0].name}")
    cells = sc.read_10x_h5(path, gex_only=True)
    return _named(cells.X, cells.obs_names, cells.var["gene_ids"], cells.var_names)


def read_cell_ranger_folder(path: Path) -> ad.AnnData:
    """The genes of all cells, with gene_id and gene_symbol; antibodies and other features are left out."""
    matrix_file, barcodes_file = _find(path, "matrix.mtx"), _find(path, "barcodes.tsv")
    features_file = _find(path, "features.tsv", "genes.tsv")
    with _open(barcodes_file) as file:
        barcodes = [line.rstrip("\r\n").split("\t")[0] for line in file]
    with _open(features_file) as file:
        features = list(csv.reader(file, delimiter="\t"))
    if short := next((i for i, row in enumerate(features) if len(row) < 2), None):
        raise BadFile(
            features_file, "an id and a symbol on each line, separated by a tab", f"line {short + 1}: {features[short]}"
        )
    with (gzip.open if matrix_file.suffix == ".gz" else open)(matrix_file, "rb") as file:
        matrix = sp.csr_matrix(scipy.io.mmread(file).T)
    if matrix.shape != (len(barcodes), len(features)):
        raise BadFile(
            matrix_file,
            f"{len(features):,} genes x {len(barcodes):,} cells, as features and barcodes list",
            f"{matrix.shape[1]:,} x {matrix.shape[0]:,}",
        )
    is_gene = np.array([len(row) < 3 or row[2] == GENE_EXPRESSION for row in features])
    genes = [row for row, keep in zip(features, is_gene, strict=True) if keep]
    return _named(matrix[:, is_gene], barcodes, [row[0] for row in genes], [row[1] for row in genes])


def _named(matrix: sp.spmatrix, barcodes: object, gene_id: object, symbol: object) -> ad.AnnData:
    ids = pd.Index(gene_id).astype(str)
    var = pd.DataFrame({"gene_id": ids, "gene_symbol": pd.Index(symbol).astype(str)}, index=ids)
    return ad.AnnData(sp.csr_matrix(matrix), obs=pd.DataFrame(index=pd.Index(barcodes).astype(str)), var=var)


def _find(folder: Path, *names: str) -> Path:
    wanted = [folder / f"{name}{suffix}" for name in names for suffix in (".gz", "")]
    found = next((file for file in wanted if file.is_file()), None)
    if found is None:
        raise BadFile(
            folder,
            EXPECTED_FOLDER,
            f"no {' or '.join(names)} (files: {', '.join(sorted(p.name for p in folder.iterdir()))})",
        )
    return found


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="")
