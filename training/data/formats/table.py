"""Dense tables of counts, tab- or comma-separated, .gz or not, genes x cells or cells x genes (scVAE's matrix_fbe and matrix_ebf)."""

import gzip
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from training.data.formats.errors import BadFile

EXPECTED = "a table of counts with names in the first row and column, separated by tabs or commas"
# Genes that nearly every table of human or mouse cells holds.
_GENE = re.compile(r"(ENS[A-Z]*G\d{11}(\.\d+)?|MT-.+|RP[LS]\d+.*|ACTB|GAPDH|MALAT1|B2M)", re.IGNORECASE)
_ROWS = 1024


def read_table(path: Path) -> ad.AnnData:
    """All cells; which way round is seen from the names, and refused where it cannot be."""
    table, rows, columns = _read(path)
    genes_in_rows, genes_in_columns = (sum(bool(_GENE.fullmatch(name)) for name in names) for names in (rows, columns))
    if genes_in_rows == genes_in_columns:
        raise BadFile(
            path,
            "names from which genes can be told (Ensembl ids, or symbols like ACTB)",
            f"rows called {rows[0]}, … and columns called {columns[0]}, …. Give the format genes_by_cells or cells_by_genes",
        )
    return _cells(table, rows, columns, genes_in_rows > genes_in_columns)


def read_genes_by_cells(path: Path) -> ad.AnnData:
    """All cells of a table whose rows are genes."""
    return _cells(*_read(path), is_transposed=True)


def read_cells_by_genes(path: Path) -> ad.AnnData:
    """All cells of a table whose rows are cells."""
    return _cells(*_read(path), is_transposed=False)


def _cells(matrix: sp.csr_matrix, rows: list[str], columns: list[str], is_transposed: bool) -> ad.AnnData:
    cells, genes = (columns, rows) if is_transposed else (rows, columns)
    counts = matrix.T.tocsr() if is_transposed else matrix
    return ad.AnnData(counts, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes))


def _read(path: Path) -> tuple[sp.csr_matrix, list[str], list[str]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        first = file.readline()
        # scVAE's files may begin with the shape.
        skipped = re.fullmatch(r"\s*\d+\s+\d+\s*", first) is not None
        header = file.readline() if skipped else first
    separator = "\t" if "\t" in header else ","
    if separator not in header:
        raise BadFile(path, EXPECTED, f"a first line without either: {header[:60]!r}" if header else "an empty file")
    blocks, rows, columns = [], [], []
    with pd.read_csv(
        path, sep=separator, index_col=0, skiprows=int(skipped), chunksize=_ROWS, dtype={0: str}, keep_default_na=True
    ) as reader:
        for block in reader:
            columns = [str(name) for name in block.columns]
            if text := [name for name, kind in zip(columns, block.dtypes, strict=True) if kind.kind not in "iuf"]:
                column = block[text[0]]
                value = column[pd.to_numeric(column, errors="coerce").isna()].iloc[0]
                raise BadFile(path, EXPECTED, f"the text {str(value)[:40]!r} in column '{text[0]}'")
            if block.isna().any(axis=None):
                i, j = np.argwhere(block.isna().to_numpy())[0]
                raise BadFile(path, EXPECTED, f"no number in row '{block.index[i]}', column '{columns[j]}'")
            blocks.append(sp.csr_matrix(block.to_numpy(dtype=np.float32)))
            rows += [str(name) for name in block.index]
    if not (rows and columns):
        raise BadFile(path, EXPECTED, f"{len(rows)} rows and {len(columns)} columns")
    return sp.vstack(blocks, format="csr"), rows, columns
