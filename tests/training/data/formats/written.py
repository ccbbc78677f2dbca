"""The same six cells of five genes written in every format, whole and broken."""

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata import AnnData

COUNTS = np.array(
    [[0, 3, 0, 1, 7], [2, 0, 0, 0, 1], [0, 0, 5, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 9], [4, 0, 0, 2, 0]], np.float32
)
CELLS = [f"AAAC{i}-1" for i in range(6)]
SYMBOLS = ["ACTB", "GAPDH", "CD3D", "MS4A1", "MT-CO1"]
IDS = [f"ENSG{i:011d}" for i in range(5)]
KINDS = ["B", "T", "B", "T", "B", "T"]


def anndata(counts: np.ndarray = COUNTS) -> AnnData:
    """The cells as AnnData."""
    obs = pd.DataFrame({"cell_type": KINDS}, index=CELLS)
    return AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame({"gene_symbol": SYMBOLS}, index=IDS))


def write_h5ad(folder: Path, counts: np.ndarray) -> Path:
    anndata(counts).write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def write_zarr(folder: Path, counts: np.ndarray) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr 3's own changes
        anndata(counts).write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def write_loom(folder: Path, counts: np.ndarray) -> Path:
    with h5py.File(folder / "cells.loom", "w") as file:
        file["matrix"] = counts.T
        file["row_attrs/Gene"] = np.array(SYMBOLS, dtype=bytes)
        file["row_attrs/Accession"] = np.array(IDS, dtype=bytes)
        file["col_attrs/CellID"] = np.array(CELLS, dtype=bytes)
        file["col_attrs/ClusterName"] = np.array(KINDS, dtype=bytes)
        file["col_attrs/BatchID"] = np.array([0, 0, 0, 1, 1, 1])[:, None]
    return folder / "cells.loom"


def write_cell_ranger_h5(folder: Path, counts: np.ndarray) -> Path:
    matrix = sp.csr_matrix(counts)
    with h5py.File(folder / "filtered.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(CELLS, dtype=bytes)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = np.array(counts.shape[::-1], dtype=np.int32)
        for name, values in {
            "id": IDS,
            "name": SYMBOLS,
            "feature_type": ["Gene Expression"] * 5,
            "genome": ["GRCh38"] * 5,
        }.items():
            group[f"features/{name}"] = np.array(values, dtype=bytes)
    return folder / "filtered.h5"


def write_cell_ranger_folder(folder: Path, counts: np.ndarray) -> Path:
    place = folder / "filtered_feature_bc_matrix"
    place.mkdir()
    with gzip.open(place / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, sp.csr_matrix(counts.T))
    with gzip.open(place / "barcodes.tsv.gz", "wt") as file:
        file.write("".join(f"{cell}\n" for cell in CELLS))
    with gzip.open(place / "features.tsv.gz", "wt") as file:
        file.write("".join(f"{i}\t{symbol}\tGene Expression\n" for i, symbol in zip(IDS, SYMBOLS, strict=True)))
    return place


def write_genes_by_cells(folder: Path, counts: np.ndarray) -> Path:
    pd.DataFrame(counts.T, index=SYMBOLS, columns=CELLS).to_csv(folder / "counts.tsv.gz", sep="\t")
    return folder / "counts.tsv.gz"


def write_cells_by_genes(folder: Path, counts: np.ndarray) -> Path:
    pd.DataFrame(counts, index=CELLS, columns=SYMBOLS).to_csv(folder / "counts.csv")
    return folder / "counts.csv"


def write_gct(folder: Path, counts: np.ndarray) -> Path:
    table = pd.DataFrame(counts.T, columns=CELLS)
    table.insert(0, "Description", SYMBOLS)
    table.insert(0, "Name", [f"{i}.4" for i in IDS])
    with gzip.open(folder / "reads.gct.gz", "wt") as file:
        file.write("#1.2\n5\t6\n")
        table.to_csv(file, sep="\t", index=False)
    return folder / "reads.gct.gz"


def write_scvae_hdf5(folder: Path, counts: np.ndarray) -> Path:
    matrix = sp.csc_matrix(counts)
    with h5py.File(folder / "scvae.h5", "w") as file:
        for name in ("data", "indices", "indptr"):
            file[name] = getattr(matrix, name)
        file["shape"] = np.array(counts.shape)
        file["cell_names"] = np.array(CELLS, dtype=bytes)
        file["Gene Names"] = np.array(SYMBOLS, dtype=bytes)
    return folder / "scvae.h5"


def write_scvae_json(folder: Path, counts: np.ndarray) -> Path:
    write_genes_by_cells(folder, counts)
    pd.Series(KINDS, index=CELLS).to_csv(folder / "labels.tsv", sep="\t", header=False)
    path = folder / "cells.json"
    path.write_text(json.dumps({"values": "counts.tsv.gz", "labels": "labels.tsv", "format": "matrix_fbe"}))
    return path


WRITERS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "h5ad": write_h5ad,
    "zarr": write_zarr,
    "loom": write_loom,
    "cell_ranger_h5": write_cell_ranger_h5,
    "cell_ranger_folder": write_cell_ranger_folder,
    "genes_by_cells": write_genes_by_cells,
    "cells_by_genes": write_cells_by_genes,
    "gct": write_gct,
    "scvae_hdf5": write_scvae_hdf5,
    "scvae_json": write_scvae_json,
}
