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

_BLOSC_HEADER = 16
"""Bytes; the last four are the size of the whole chunk."""


def read_h5ad(path: Path, layer: str | None = None) -> ad.AnnData:
    """All cells of an .h5ad of any age; `layer` is a layer or "raw"."""
    _need_hdf5(path)
    with h5py.File(path) as file:
        _need_members(file, path, EXPECTED_H5AD)
    with warnings.catch_warnings():
        # Of old files' encodings, which are read all the same.
        warnings.simplefilter("ignore")
        return _choose(ad.read_h5ad(path), path, layer, EXPECTED_H5AD)


def read_zarr(path: Path, layer: str | None = None) -> ad.AnnData:
    """All cells of a .zarr folder (zarr 2 or 3); `layer` is a layer or "raw"."""
    group = zarr.open_group(path, mode="r")
    _need_members(group, path, EXPECTED_ZARR)
    _check_chunks(group, path, layer)
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
    group = zarr.open_group(path, mode="r")
    _check_chunks(group, path, layer)
    return _open(group, path, layer, EXPECTED_ZARR)


def _need_hdf5(path: Path) -> None:
    if not h5py.is_hdf5(path):
        raise BadFile(path, EXPECTED_H5AD, f"{path.stat().st_size:,} bytes that are not HDF5 (or a file cut short)")


def _need_members(group: Any, path: Path, expected: str, names: tuple[str, ...] = ("X", "obs", "var")) -> None:
    if missing := [name for name in names if name not in group]:
        raise BadFile(path, expected, f"no {', '.join(missing)}")


def _check_chunks(group: zarr.Group, path: Path, layer: str | None) -> None:
    """Refuse sparse counts of which a part is missing: zarr reads a chunk that is not there as zeros, and blosc one that is cut short."""
    place = _place(layer)
    if place not in group or not isinstance(group[place], zarr.Group):
        return
    for name in ("data", "indices"):
        if name not in group[place]:
            raise BadFile(path, EXPECTED_ZARR, f"no {place}/{name}")
        array = group[place][name]
        # Counts that are stored are not zero, and neither are all of a chunk's columns: an empty chunk is a lost one.
        if array.nchunks_initialized < array.nchunks:
            missing = array.nchunks - array.nchunks_initialized
            raise BadFile(path, EXPECTED_ZARR, f"{missing:,} of {array.nchunks:,} chunks of {place}/{name} missing")
        if "blosc" not in str(array.metadata).lower() or array.shards is not None:
            continue
        for file in (path / place / name).rglob("*"):
            if file.is_file() and file.suffix != ".json" and not file.name.startswith("."):
                with file.open("rb") as chunk:
                    header = chunk.read(_BLOSC_HEADER)
                n_bytes = int.from_bytes(header[12:16], "little")
                if len(header) < _BLOSC_HEADER or n_bytes != file.stat().st_size:
                    raise BadFile(
                        file, f"a blosc chunk of {n_bytes:,} bytes, as its header says", f"{file.stat().st_size:,}"
                    )


def _place(layer: str | None) -> str:
    return "X" if layer is None else "raw/X" if layer == RAW else f"layers/{layer}"


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
    place = _place(layer)
    table = "raw/var" if layer == RAW else "var"
    _need_members(group, path, expected, (place, "obs", table))
    if group[place].attrs.get("encoding-type") != "csr_matrix":
        kind = group[place].attrs.get("encoding-type", "unknown")
        raise BadFile(path, f"{place} as csr_matrix, which cells can be read from one by one", f"{place} as {kind}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        obs, var = read_elem(group["obs"]), read_elem(group[table])
        return ad.AnnData(sparse_dataset(group[place]), obs=obs, var=var)
