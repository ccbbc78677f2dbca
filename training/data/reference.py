"""The reference: data sets joined over their common genes, one technical batch each."""

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from training.config import CellFilter, DataFile
from training.data import gene_map, source
from training.data.cell_filters import keep_cells
from training.data.prepared import IS_USED


class NoCommonGenes(Exception):
    """Data sets have no gene in common."""


def load_reference(
    data: Sequence[str | DataFile], cells: CellFilter | None = None, map_symbols: bool = False, seed: int = 0
) -> ad.AnnData:
    """The cells of several data sets over the genes that all of them have.

    Args:
        data: names of data sets of the registry, or files.
        cells: which cells are used; None for all.
        map_symbols: give genes with a symbol only their Ensembl id (see gene_map.py).
        seed: of the draw of cells, where there is one.

    Returns:
        Counts CSR float32, shape (n_cells, n_common_genes), or a matrix on disk for one backed file. `obs` as the readers give it, with
        `dataset` added; cells are called <data set>/<cell>. `var` has `gene_id` and `gene_symbol`; genes are in the order of the first set.

    Raises:
        NoCommonGenes: nothing is left.
        NoCells: no cell of a set passes the filter.
        as `source.read` does.
    """
    sets = {}
    for one in data:
        name = one if isinstance(one, str) else one.name
        found = source.read(one)
        if map_symbols:
            found = gene_map.map_symbols(found, name)
        if cells is not None and cells != CellFilter():
            keep = keep_cells(found, cells, name, seed)
            if sp.issparse(found.X):
                found = found[keep].copy()
            else:
                found.obs[IS_USED] = keep
        sets[name] = found
    (name, first), *others = sets.items()
    return join(sets) if others or sp.issparse(first.X) else on_disk(name, first)


def on_disk(name: str, cells: ad.AnnData) -> ad.AnnData:
    """What `join` makes of one set, with all its columns, as they cannot be taken out of a matrix on disk: ambiguous genes lose their names."""
    key = np.where(cells.var["gene_id"] != "", cells.var["gene_id"], cells.var["gene_symbol"]).astype(object)
    has_ids = (cells.var["gene_id"] != "").any()
    if has_ids:
        key = cells.var["gene_id"].to_numpy(dtype=object)
    is_usable = (key != "") & ~pd.Series(key).duplicated(keep=False).to_numpy()
    symbols = cells.var["gene_symbol"].where(is_usable, "")
    var = pd.DataFrame(
        {
            "gene_id": cells.var["gene_id"].where(is_usable, ""),
            "gene_symbol": symbols.mask(symbols.duplicated(keep=False), "") if has_ids else symbols,
        }
    )
    var.index = [
        gene if usable else f"unusable-{i}" for i, (gene, usable) in enumerate(zip(key, is_usable, strict=True))
    ]
    obs = cells.obs.copy()
    obs["dataset"] = name
    obs.index = [f"{name}/{cell}" for cell in obs.index]
    return ad.AnnData(cells.X, obs=obs, var=var)


def join(sets: dict[str, ad.AnnData]) -> ad.AnnData:
    """Join sets by Ensembl id; a set with symbols only takes its ids from the sets that have both.

    A symbol that stands for two ids, or an id that occurs twice in a set, is ambiguous and left out.

    Raises:
        NoCommonGenes: nothing is left.
    """
    id_by_symbol = _unambiguous_ids(sets)
    parts, keys = [], []
    for name, cells in sets.items():
        part = cells.copy()
        key = _keys(part, id_by_symbol)
        is_usable = (key != "") & ~pd.Series(key).duplicated(keep=False).to_numpy()
        part = part[:, is_usable].copy()
        part.var_names = key[is_usable]
        part.obs["dataset"] = name
        part.obs_names = [f"{name}/{cell}" for cell in part.obs_names]
        parts.append(part)
        keys.append(set(part.var_names))
    common = [gene for gene in parts[0].var_names if all(gene in others for others in keys[1:])]
    if not common:
        raise NoCommonGenes(f"{' and '.join(sets)} have no gene in common. Check that they are of one species.")
    joined = ad.concat([part[:, common] for part in parts], join="outer")
    named = [part.var.loc[common] for part in parts]
    has_ids = any((table["gene_id"] != "").all() for table in named)
    gene_symbol = next((table["gene_symbol"] for table in named if (table["gene_symbol"] != "").all()), None)
    symbols = pd.Series("", index=common) if gene_symbol is None else gene_symbol
    joined.var = pd.DataFrame(
        {
            "gene_id": common if has_ids else "",
            # A symbol that two genes share names neither.
            "gene_symbol": symbols.mask(symbols.duplicated(keep=False), "").to_numpy(),
        },
        index=pd.Index(common),
    )
    for column in ("cell_type", "published_split"):
        if column in joined.obs:
            joined.obs[column] = joined.obs[column].astype(object).where(joined.obs[column].notna(), "")
    return joined


def _unambiguous_ids(sets: dict[str, ad.AnnData]) -> dict[str, str]:
    tables = [cells.var[(cells.var["gene_id"] != "") & (cells.var["gene_symbol"] != "")] for cells in sets.values()]
    pairs = pd.concat(tables)[["gene_symbol", "gene_id"]].drop_duplicates()
    pairs = pairs[~pairs["gene_symbol"].duplicated(keep=False)]
    return dict(zip(pairs["gene_symbol"], pairs["gene_id"], strict=True))


def _keys(cells: ad.AnnData, id_by_symbol: dict[str, str]) -> np.ndarray:
    """What a set's genes are joined by: Ensembl ids where any set has them, else symbols."""
    if not id_by_symbol:
        return np.where(cells.var["gene_id"] != "", cells.var["gene_id"], cells.var["gene_symbol"]).astype(object)
    pairs = zip(cells.var["gene_id"], cells.var["gene_symbol"], strict=True)
    return np.array([gene_id or id_by_symbol.get(symbol, "") for gene_id, symbol in pairs], dtype=object)
