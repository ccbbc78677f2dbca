"""One data set of a run, registered or a file of the user's: its cells in the form that readers/ documents, its digests and its licence."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from training.config import DataFile
from training.data import formats, registry
from training.data.counts import check_counts
from training.data.formats.errors import BadFile

ENSEMBL = r"ENS[A-Z]*G\d{11}(\.\d+)?"
ID_COLUMNS = ("gene_id", "gene_ids", "ensembl_id", "ensembl", "feature_id")
SYMBOL_COLUMNS = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name", "symbol", "Gene")
_CHUNK = 1 << 24


def read(data: str | DataFile) -> AnnData:
    """The cells of a data set.

    Returns:
        X: CSR float32 of counts, or a dataset on disk for a backed file. `var` has gene_id and gene_symbol, `obs` at least `batch`.

    Raises:
        BadFile: the file is broken, is not what its format wants, lacks a column, or holds something else than counts.
        UnknownFormat: the file's format is not known.
        as `registry.read` does.
    """
    if isinstance(data, str):
        return registry.read(data)
    cells = formats.read(data.path, data.format, data.layer, data.backed)
    obs = cells.obs.copy()
    for wanted, own in data.columns.items():
        if own not in obs:
            raise BadFile(
                data.path,
                f"a column '{own}' in obs, for {wanted}",
                f"the columns {', '.join(map(str, obs.columns)) or '(none)'}",
            )
        obs[wanted] = obs[own].astype(object).where(obs[own].notna(), "").astype(str)
    if "batch" not in obs:
        obs["batch"] = data.name
    if not obs.index.is_unique:
        # Barcodes repeat where samples were put together.
        obs.index = [f"{name}-{i}" for i, name in enumerate(obs.index.astype(str))]
    var = pd.DataFrame(_gene_names(cells.var, data), index=pd.Index(cells.var_names.astype(str)))
    if data.backed:
        return AnnData(cells.X, obs=obs, var=_unique(var))
    counts = check_counts(cells.X, data.path, obs.index, var.index)
    found = AnnData(counts, obs=obs, var=_unique(var))
    for name, values in cells.obsm.items():
        found.obsm[name] = values
    return found


def digests(data: str | DataFile) -> dict[str, str]:
    """sha256 of each file of a data set, by name."""
    if isinstance(data, str):
        return {file.name: file.sha256 for file in registry.find(data).files}
    files = sorted(p for p in data.path.rglob("*") if p.is_file()) if data.path.is_dir() else [data.path]
    if data.path.is_dir() and len(files) > len(("barcodes", "features", "matrix")):
        # A zarr may have a million chunks: one digest over all of them, in order.
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(data.path)} {_sha256(file)}\n".encode())
        return {data.path.name: whole.hexdigest()}
    return {file.name: _sha256(file) for file in files}


def licence(data: str | DataFile) -> str:
    """Of the data."""
    return registry.find(data).licence if isinstance(data, str) else data.licence


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _gene_names(var: pd.DataFrame, data: DataFile) -> dict[str, np.ndarray]:
    """gene_id (Ensembl without version, or empty) and gene_symbol (or empty)."""
    index = pd.Series(var.index.astype(str), index=var.index)
    is_ensembl = index.str.fullmatch(ENSEMBL)

    def column(name: str) -> pd.Series:
        if name == "index":
            return index
        if name not in var:
            raise BadFile(
                data.path, f"a column '{name}' in var", f"the columns {', '.join(map(str, var.columns)) or '(none)'}"
            )
        return var[name].astype(object).where(var[name].notna(), "").astype(str)

    gene_id = data.gene_id or next((name for name in ID_COLUMNS if name in var), "index")
    symbol = data.gene_symbol or next((name for name in SYMBOL_COLUMNS if name in var), "index")
    ids, symbols = column(gene_id), column(symbol)
    if data.gene_id is None:
        ids = ids.where(ids.str.fullmatch(ENSEMBL), index.where(is_ensembl, ""))
    if data.gene_symbol is None:
        symbols = symbols.where(~symbols.str.fullmatch(ENSEMBL), "")
    return {"gene_id": ids.str.replace(r"\.\d+$", "", regex=True).to_numpy(), "gene_symbol": symbols.to_numpy()}


def _unique(var: pd.DataFrame) -> pd.DataFrame:
    """The same table with an index that is unique, as AnnData wants it; genes are joined by their columns."""
    if not var.index.is_unique:
        var.index = [f"{name}-{i}" for i, name in enumerate(var.index)]
    return var
