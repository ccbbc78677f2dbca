"""Readers, by the name that sources.yaml gives them. To add one: write its function and list it here.

A reader takes the paths of a data set's files, by name, and returns cells:
X is CSR float32 of raw counts, shape (n_cells, n_genes); `var` has `gene_id` (Ensembl without version, or empty) and `gene_symbol` (or
empty), and its index is unique; `obs` has `batch`, `cell_type_original` (as published) and, where we know them, `cell_type` (one of
eight broad types of blood cells) and `published_split` ("train" or "test").
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from anndata import AnnData

from training.data.readers.cell_lines import read_cell_lines
from training.data.readers.cite_seq import read_cite_seq
from training.data.readers.mouse_bladder import read_mouse_bladder
from training.data.readers.pbmc3k import read_pbmc3k
from training.data.readers.pbmc_facs import read_pbmc_facs

READERS: dict[str, Callable[[Mapping[str, Path]], AnnData]] = {
    "pbmc_facs": read_pbmc_facs,
    "pbmc3k": read_pbmc3k,
    "cell_lines": read_cell_lines,
    "cite_seq": read_cite_seq,
    "mouse_bladder": read_mouse_bladder,
}
