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
    data: Sequence[str | DataFile],
    cells: CellFilter | None = None,
    map_symbols: bool = False,
    seed: int = 0,
    genes: pd.DataFrame | None = None,
) -> ad.AnnData:
    """The cells of several data sets over the genes that all of them have.

    Args:
        data: names of data sets of the registry, or files.
        cells: which cells are used; None for all.
        map_symbols: give genes with a symbol only their Ensembl id (see gene_map.py).
        seed: of the draw of cells, where there is one.
        genes: take these, with their gene_id and gene_symbol, in place of those that all sets have; what a set lacks counts zero.

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
    return join(sets, genes) if others or sp.issparse(first.X) else on_disk(name, first)


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


def join(sets: dict[str, ad.AnnData], genes: pd.DataFrame | None = None) -> ad.AnnData:
    """Join sets by Ensembl id; a set with symbols only takes its ids from the sets that have both, or from `genes`.

    A symbol that stands for two ids, or an id that occurs twice in a set, is ambiguous and left out. With `genes` the result has exactly
    these, and `uns["gene_overlap"]` holds the share of them that each set has.

    Raises:
        NoCommonGenes: nothing is left.
    """
    # A set without cells: its names count, and nothing else of it.
    wanted = None
    if genes is not None:
        genes = genes.set_axis(genes.index.astype(str))
        wanted = ad.AnnData(sp.csr_matrix((0, len(genes)), dtype=np.float32), var=genes)
    id_by_symbol = _unambiguous_ids(sets | ({"": wanted} if wanted is not None else {}))
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
    if wanted is not None:
        order = pd.Index(_keys(wanted, id_by_symbol))
        overlap = {name: float(order.isin(part.var_names).mean()) for name, part in zip(sets, parts, strict=True)}
        joined = ad.concat([_over(part, order) for part in parts], join="outer")
        joined.var = genes.set_axis(order)
        joined.uns["gene_overlap"] = overlap
        return _without_missing(joined)
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
    return _without_missing(joined)


def _over(cells: ad.AnnData, genes: pd.Index) -> ad.AnnData:
    """The cells over `genes`; those that they lack count zero."""
    position = cells.var_names.get_indexer(genes)
    present = np.flatnonzero(position >= 0)
    # A column per gene that is there, put to its place by a product: sparse matrices have no cheaper way to add empty columns.
    place = sp.csr_matrix((np.ones(len(present)), (position[present], present)), shape=(cells.n_vars, len(genes)))
    counts = sp.csr_matrix(sp.csr_matrix(cells.X) @ place, dtype=np.float32)
    return ad.AnnData(counts, obs=cells.obs, var=pd.DataFrame(index=genes), obsm=dict(cells.obsm))


def _without_missing(joined: ad.AnnData) -> ad.AnnData:
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
