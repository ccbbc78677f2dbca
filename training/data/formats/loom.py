"""Loom: HDF5 with a genes x cells matrix and attributes of both (http://linnarssonlab.org/loompy/format); scVAE's names are understood."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from training.data.formats.errors import BadFile

EXPECTED = "a .loom: HDF5 with matrix (genes x cells), row_attrs and col_attrs"
CELL_NAMES, GENE_NAMES, GENE_IDS = ("CellID", "Cell", "obs_names"), ("Gene", "var_names"), ("Accession", "gene_id")
_ROWS = 512
"""Genes that are read at once, so that the dense matrix is never whole in memory."""


def read_loom(path: Path, layer: str | None = None) -> ad.AnnData:
    """All cells of a .loom.

    Column attributes become `obs`: ClusterName, or else ClusterID by the file's CellTypes, also as `cell_type`; BatchID also as `batch`.
    """
    if not h5py.is_hdf5(path):
        raise BadFile(path, EXPECTED, f"{path.stat().st_size:,} bytes that are not HDF5 (or a file cut short)")
    place = "matrix" if layer is None else f"layers/{layer}"
    with h5py.File(path) as file:
        if missing := [name for name in (place, "row_attrs", "col_attrs") if name not in file]:
            raise BadFile(path, EXPECTED, f"no {', '.join(missing)} (members: {', '.join(file)})")
        matrix = file[place]
        if matrix.ndim != 2 or matrix.dtype.kind not in "iuf":
            raise BadFile(path, EXPECTED, f"{place} of shape {matrix.shape} and type {matrix.dtype}")
        blocks = [sp.csr_matrix(matrix[i : i + _ROWS].astype(np.float32)) for i in range(0, matrix.shape[0], _ROWS)]
        counts = sp.vstack(blocks, format="csr").T.tocsr()
        obs = _attributes(file["col_attrs"], counts.shape[0], path)
        var = _attributes(file["row_attrs"], counts.shape[1], path)
        # Loom 2 holds global attributes on the file, loom 3 in a group.
        cell_types = file.attrs.get("CellTypes", file["attrs/CellTypes"][()] if "attrs/CellTypes" in file else None)
    if "ClusterName" in obs:
        obs["cell_type"] = obs["ClusterName"]
    elif "ClusterID" in obs:
        cluster = obs["ClusterID"].astype(int)
        names = None if cell_types is None else _text(np.asarray(cell_types))
        obs["cell_type"] = cluster.astype(str) if names is None else names[cluster]
    if "BatchID" in obs:
        obs["batch"] = obs["BatchID"].astype(str)
    obs.index = _names(obs, CELL_NAMES, "cell")
    var.index = _names(var, GENE_NAMES, "gene")
    if accession := next((name for name in GENE_IDS if name in var), None):
        var["gene_id"] = var[accession].astype(str)
    return ad.AnnData(counts, obs=obs, var=var)


def _attributes(group: h5py.Group, length: int, path: Path) -> pd.DataFrame:
    """One-dimensional attributes; scVI's files write columns of width 1."""
    table = {}
    for name, values in group.items():
        column = values[()]
        if column.ndim == 2 and column.shape[1] == 1:
            column = column[:, 0]
        if len(column) != length:
            raise BadFile(path, EXPECTED, f"{group.name}/{name} with {len(column):,} values for {length:,}")
        if column.ndim == 1:
            table[name] = _text(column) if column.dtype.kind in "SO" else column
    return pd.DataFrame(table, index=range(length))


def _text(values: NDArray[np.generic]) -> NDArray[np.object_]:
    return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values.ravel()], dtype=object)


def _names(table: pd.DataFrame, keys: tuple[str, ...], kind: str) -> pd.Index:
    key = next((key for key in keys if key in table), None)
    return pd.Index([f"{kind}{i}" for i in range(len(table))] if key is None else table[key].astype(str))
