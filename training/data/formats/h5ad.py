"""AnnData on disk, as HDF5 (.h5ad) or zarr: read whole, or with the counts left where they are."""

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import zarr
from anndata.io import read_elem, sparse_dataset

from training.data.formats.errors import BadFile

EXPECTED_H5AD = "an .h5ad: HDF5 with X, obs and var as anndata writes them"
EXPECTED_ZARR = "a .zarr folder with X, obs and var as anndata writes them"
RAW = "raw"
"""Name of the `layer` that means adata.raw."""


def read_h5ad(path: Path, layer: str | None = None) -> ad.AnnData:
    """All cells of an .h5ad of any age; `layer` is a layer or "raw"."""
    _need_hdf5(path)
    with warnings.catch_warnings():
        # Of old files' encodings, which are read all the same.
        warnings.simplefilter("ignore")
        return _choose(ad.read_h5ad(path), path, layer, EXPECTED_H5AD)


def read_zarr(path: Path, layer: str | None = None) -> ad.AnnData:
    """All cells of a .zarr folder (zarr 2 or 3); `layer` is a layer or "raw"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _choose(ad.read_zarr(path), path, layer, EXPECTED_ZARR)


def open_h5ad(path: Path, layer: str | None = None) -> ad.AnnData:
    """Obs and var of an .h5ad in memory, X a CSR dataset on disk."""
    _need_hdf5(path)
    # Open for as long as the process: rows are read while training.
    return _open(h5py.File(path, "r"), path, layer, EXPECTED_H5AD)


def open_zarr(path: Path, layer: str | None = None) -> ad.AnnData:
    """Obs and var of a .zarr folder in memory, X a CSR dataset on disk."""
    return _open(zarr.open_group(path, mode="r"), path, layer, EXPECTED_ZARR)


def _need_hdf5(path: Path) -> None:
    if not h5py.is_hdf5(path):
        raise BadFile(path, EXPECTED_H5AD, f"{path.stat().st_size:,} bytes that are not HDF5 (or a file cut short)")


def _choose(cells: ad.AnnData, path: Path, layer: str | None, expected: str) -> ad.AnnData:
    if layer == RAW:
        if cells.raw is None:
            raise BadFile(path, f"{expected}, and raw", "no raw")
        return ad.AnnData(cells.raw.X, obs=cells.obs, var=cells.raw.var)
    if layer is not None and layer not in cells.layers:
        raise BadFile(path, f"{expected}, and the layer '{layer}'", f"the layers {', '.join(cells.layers) or '(none)'}")
    matrix = cells.X if layer is None else cells.layers[layer]
    if matrix is None:
        raise BadFile(path, expected, "no X")
    found = ad.AnnData(matrix, obs=cells.obs, var=cells.var)
    for name, values in cells.obsm.items():
        found.obsm[name] = values
    return found


def _open(group: Any, path: Path, layer: str | None, expected: str) -> ad.AnnData:
    place = "X" if layer is None else "raw/X" if layer == RAW else f"layers/{layer}"
    table = "raw/var" if layer == RAW else "var"
    if missing := [name for name in (place, "obs", table) if name not in group]:
        raise BadFile(path, expected, f"no {', '.join(missing)}")
    if group[place].attrs.get("encoding-type") != "csr_matrix":
        kind = group[place].attrs.get("encoding-type", "unknown")
        raise BadFile(path, f"{place} as csr_matrix, which cells can be read from one by one", f"{place} as {kind}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        obs, var = read_elem(group["obs"]), read_elem(group[table])
        return ad.AnnData(sparse_dataset(group[place]), obs=obs, var=var)
