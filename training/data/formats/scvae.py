"""scVAE's own formats: a sparse matrix in HDF5, and a JSON file that joins values and labels."""

import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from training.data.formats.errors import BadFile

EXPECTED_HDF5 = (
    "scVAE's sparse HDF5: one group with data, indices, indptr and shape (cells x genes), and names of cells and genes"
)
EXPECTED_JSON = "scVAE's JSON: {values: a file, labels: a file, format: a name}, or the same two under URLs with 'full'"
MEMBERS = ("data", "indices", "indptr", "shape")
CELLS = (
    "cells",
    "cellnames",
    "cellids",
    "barcodes",
    "samples",
    "samplenames",
    "examples",
    "examplenames",
    "observations",
    "obsnames",
)
GENES = ("genes", "genenames", "genesymbols", "geneids", "features", "featurenames", "variables", "varnames")
FORMAT_NAMES = {
    "matrix_fbe": "genes_by_cells",
    "matrix_ebf": "cells_by_genes",
    "10x": None,
    "gtex": "gct",
    "h5": "scvae_hdf5",
}
"""scVAE's names of formats by ours; None is seen from the file."""


def find_group(file: h5py.File) -> h5py.Group | None:
    """The group that holds the sparse matrix: the file itself or its only group."""
    groups = [file, *(member for member in file.values() if isinstance(member, h5py.Group))]
    return next((group for group in groups if all(name in group for name in MEMBERS)), None)


def read_scvae_hdf5(path: Path) -> ad.AnnData:
    """All cells; CSC or CSR is told from the length of indptr, and genes x cells from the lengths of the names."""
    if not h5py.is_hdf5(path):
        raise BadFile(path, EXPECTED_HDF5, f"{path.stat().st_size:,} bytes that are not HDF5 (or a file cut short)")
    with h5py.File(path) as file:
        group = find_group(file)
        if group is None:
            raise BadFile(path, EXPECTED_HDF5, f"the members {', '.join(file)}")
        data, indices, indptr, shape = (group[name][()] for name in MEMBERS)
        names = {key.lower().replace("_", "").replace(" ", ""): group[key] for key in group if key not in MEMBERS}
        found = {
            kind: next((_text(names[key][()]) for key in keys if key in names), None)
            for kind, keys in (("cells", CELLS), ("genes", GENES))
        }
    shape = tuple(int(size) for size in shape)
    if data.dtype.kind not in "iuf":
        raise BadFile(path, EXPECTED_HDF5, f"data of type {data.dtype}")
    # For a square matrix scVAE's own: CSC.
    kind = next((k for k, n in ((sp.csc_matrix, shape[-1]), (sp.csr_matrix, shape[0])) if len(indptr) == n + 1), None)
    if len(shape) != 2 or kind is None or len(data) != len(indices):
        lengths = ", ".join(f"{n} {len(a):,}" for n, a in zip(MEMBERS, (data, indices, indptr), strict=False))
        raise BadFile(path, EXPECTED_HDF5, f"arrays of {lengths} values for a matrix of shape {shape}")
    matrix = kind((data, indices, indptr), shape=shape)
    matrix.check_format()
    lengths = tuple(None if found[k] is None else len(found[k]) for k in ("cells", "genes"))
    fits, fits_turned = (
        all(n is None or n == size for n, size in zip(lengths, order, strict=True)) for order in (shape, shape[::-1])
    )
    if not (fits or fits_turned):
        raise BadFile(
            path, EXPECTED_HDF5, f"{lengths[0]} names of cells and {lengths[1]} of genes for a matrix of {shape}"
        )
    counts = sp.csr_matrix(matrix if fits else matrix.T)
    cells = found["cells"] or [f"cell{i}" for i in range(counts.shape[0])]
    genes = found["genes"] or [f"gene{i}" for i in range(counts.shape[1])]
    return ad.AnnData(counts, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes))


def _text(values: np.ndarray) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def parse_description(path: Path) -> tuple[Path, Path | None, str | None]:
    """Files of values and labels, and the name of the values' format, None where it is to be seen from the file."""
    document = json.loads(path.read_text())
    if not isinstance(document, dict):
        raise BadFile(path, EXPECTED_JSON, f"a {type(document).__name__}")
    urls = document.get("URLs", {})
    places = {kind: urls.get(kind, {}).get("full") if urls else document.get(kind) for kind in ("values", "labels")}
    if not isinstance(places["values"], str):
        raise BadFile(path, EXPECTED_JSON, f"no file of values (keys: {', '.join(document)})")
    files = {}
    for kind, place in places.items():
        if place and "://" in place:
            raise BadFile(path, "files beside the description", f"the address {place}. Download it and name the file")
        files[kind] = path.parent / place if place else None
        if files[kind] and not files[kind].exists():
            raise BadFile(path, f"the file of {kind}", f"no {files[kind]}")
    name = document.get("format")
    return files["values"], files["labels"], FORMAT_NAMES.get(name, name)


def add_labels(cells: ad.AnnData, path: Path) -> None:
    """Put labels into obs["cell_type"]: a table with names of cells and labels, or one label a line in the order of the cells."""
    separator = "," if ".csv" in path.suffixes else "\t"
    table = pd.read_csv(path, sep=separator, header=None, dtype=str, keep_default_na=False)
    if table.shape[1] == 1:
        # With a header there is one line more than there are cells.
        labels = table[0].iloc[len(table) - cells.n_obs :] if len(table) - cells.n_obs in (0, 1) else None
        if labels is None:
            raise BadFile(path, f"a label for each of {cells.n_obs:,} cells", f"{len(table):,} lines")
        cells.obs["cell_type"] = labels.to_numpy()
        return
    label_by_cell = dict(zip(table[0], table[1], strict=True))
    if missing := [name for name in cells.obs_names if name not in label_by_cell]:
        raise BadFile(
            path,
            "a label for each cell, by its name in the first column",
            f"none for {len(missing):,} cells, first '{missing[0]}'",
        )
    cells.obs["cell_type"] = [label_by_cell[name] for name in cells.obs_names]
