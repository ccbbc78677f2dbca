"""Formats of files of cells, by the name that a configuration gives them. To add one: write its file and list it here.

A reader takes a path and returns AnnData with one row per cell, as the file has it; training/data/source.py makes the columns and types
alike and checks that the values are counts.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
from anndata import AnnData

from training.data.formats import cell_ranger, gct, h5ad, loom, scvae, table
from training.data.formats.errors import BadFile, UnknownFormat


@dataclass(frozen=True)
class Format:
    """How a kind of file is read."""

    read: Callable[..., AnnData]
    expected: str
    """What such a file is, for the sentence about one that is broken."""

    open: Callable[..., AnnData] | None = None
    """Reads all but the counts, which stay on disk."""

    has_layers: bool = False
    """`read` and `open` take the name of a layer."""


FORMATS: dict[str, Format] = {
    "h5ad": Format(h5ad.read_h5ad, h5ad.EXPECTED_H5AD, h5ad.open_h5ad, has_layers=True),
    "zarr": Format(h5ad.read_zarr, h5ad.EXPECTED_ZARR, h5ad.open_zarr, has_layers=True),
    "loom": Format(loom.read_loom, loom.EXPECTED, has_layers=True),
    "cell_ranger_h5": Format(cell_ranger.read_cell_ranger_h5, cell_ranger.EXPECTED_H5),
    "cell_ranger_folder": Format(cell_ranger.read_cell_ranger_folder, cell_ranger.EXPECTED_FOLDER),
    "table": Format(table.read_table, table.EXPECTED),
    "genes_by_cells": Format(table.read_genes_by_cells, table.EXPECTED),
    "cells_by_genes": Format(table.read_cells_by_genes, table.EXPECTED),
    "gct": Format(gct.read_gct, gct.EXPECTED),
    "scvae_hdf5": Format(scvae.read_scvae_hdf5, scvae.EXPECTED_HDF5),
}
DESCRIPTION = "scvae_json"
"""The format that only points to others."""


def read(path: Path, name: str | None = None, layer: str | None = None, backed: bool = False) -> AnnData:
    """The cells of a file.

    Args:
        path: a file, or a folder.
        name: a key of FORMATS, or "scvae_json"; None to see it from the file.
        layer: where the file's format has layers, the one with the counts.
        backed: leave the counts on disk.

    Raises:
        UnknownFormat: no such format, or none that the file could be of, or one that cannot do what is asked.
        BadFile: the file is not as its format wants it.
    """
    if not path.exists():
        raise BadFile(path, "a file or folder", "nothing there")
    name = name or infer(path)
    if name == DESCRIPTION:
        return _read_description(path)
    if name not in FORMATS:
        raise UnknownFormat(f"There is no format '{name}'. Known: {', '.join((*FORMATS, DESCRIPTION))}.")
    kind = FORMATS[name]
    if layer is not None and not kind.has_layers:
        raise UnknownFormat(f"{path}: the format {name} has no layers, so that '{layer}' cannot be read.")
    if backed and kind.open is None:
        able = ", ".join(other for other, found in FORMATS.items() if found.open)
        raise UnknownFormat(f"{path}: the counts of a {name} cannot stay on disk; those of {able} can.")
    try:
        function = kind.open if backed and kind.open else kind.read
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*names are not unique", UserWarning)  # source.py makes them so
            return function(path, layer) if kind.has_layers else function(path)
    except (BadFile, MemoryError):
        raise
    except Exception as error:  # whatever a library says of a broken file
        raise BadFile(path, kind.expected, f"{type(error).__name__}: {error}") from error


def _read_description(path: Path) -> AnnData:
    try:
        values, labels, name = scvae.parse_description(path)
        cells = read(values, name)
        if labels is not None:
            scvae.add_labels(cells, labels)
    except (BadFile, UnknownFormat):
        raise
    except Exception as error:
        raise BadFile(path, scvae.EXPECTED_JSON, f"{type(error).__name__}: {error}") from error
    return cells


def infer(path: Path) -> str:
    """The name of a file's format, from its name and its first members.

    Raises:
        UnknownFormat: it could be of none.
    """
    name = path.name.lower().removesuffix(".gz")
    if path.is_dir():
        if any((path / member).exists() for member in ("zarr.json", ".zgroup", ".zattrs")):
            return "zarr"
        if any(path.glob("*.mtx*")) or any(path.glob("barcodes.tsv*")):
            return "cell_ranger_folder"
        raise UnknownFormat(
            f"{path} is a folder, but neither a zarr nor Cell Ranger's: it has no zarr.json, .zgroup or matrix.mtx."
        )
    suffixes = {".h5ad": "h5ad", ".loom": "loom", ".gct": "gct", ".json": DESCRIPTION}
    tables = dict.fromkeys((".tsv", ".csv", ".txt"), "table")
    if found := next((kind for suffix, kind in (suffixes | tables).items() if name.endswith(suffix)), None):
        return found
    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            group = scvae.find_group(file)
            if group is not None:
                is_cell_ranger = "features" in group or ("barcodes" in group and "gene_names" in group)
                return "cell_ranger_h5" if is_cell_ranger else "scvae_hdf5"
            if "obs" in file and "var" in file:
                return "h5ad"
            if "matrix" in file and "row_attrs" in file:
                return "loom"
        raise UnknownFormat(
            f"{path} is HDF5, but not laid out as h5ad, loom, Cell Ranger's or scVAE's. Members: {', '.join(_members(path))}."
        )
    if name.endswith((".h5", ".hdf5")):
        raise BadFile(path, "HDF5", f"{path.stat().st_size:,} bytes that are not (or a file cut short)")
    raise UnknownFormat(
        f"{path}: the format cannot be seen from the name. Give one of {', '.join((*FORMATS, DESCRIPTION))}."
    )


def _members(path: Path) -> list[str]:
    with h5py.File(path) as file:
        return list(file)
