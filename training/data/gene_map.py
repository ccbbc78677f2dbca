"""Symbols to Ensembl ids by HGNC's table, outdated symbols included; columns that become one gene are summed."""

from collections import Counter

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from training.data import registry
from training.gene_names import HgncGene, read_hgnc


class CountsOnDisk(Exception):
    """Columns of a matrix that stays on disk cannot be summed."""


def map_symbols(cells: AnnData, name: str) -> AnnData:
    """The cells of a set with HGNC's id and symbol for every gene that had a symbol only and that HGNC knows by one gene.

    Raises:
        CountsOnDisk: the counts are not in memory.
        as `registry.fetch` does, for HGNC's table.
    """
    if not sp.issparse(cells.X):
        raise CountsOnDisk(
            f"'{name}' stays on disk (backed), where genes cannot be summed. Leave out map_symbols, or backed."
        )
    files = registry.fetch_all(registry.find("hgnc"))
    return rename(cells, gene_by_name(read_hgnc(files["hgnc_complete_set.txt.gz"])))


def gene_by_name(hgnc: list[HgncGene]) -> dict[str, HgncGene]:
    """The gene that a name means: its approved symbol, or a previous or alias one that no other gene claims."""
    claims = Counter(name for gene in hgnc for name in set(gene.other))
    others = {name: gene for gene in hgnc for name in gene.other if claims[name] == 1 and gene.gene_id}
    return others | {gene.symbol: gene for gene in hgnc if gene.gene_id}


def rename(cells: AnnData, known: dict[str, HgncGene]) -> AnnData:
    """The same cells over renamed genes, in the order in which they first come; counts of one gene are summed."""
    has_id = (cells.var["gene_id"] != "").to_numpy()
    found = [None if done else known.get(symbol) for done, symbol in zip(has_id, cells.var["gene_symbol"], strict=True)]
    ids = [gene.gene_id if gene else i for gene, i in zip(found, cells.var["gene_id"], strict=True)]
    symbols = [gene.symbol if gene else s for gene, s in zip(found, cells.var["gene_symbol"], strict=True)]
    # A gene without an id stays by itself: the same symbol twice may be two genes.
    keys = [i or f"#{position}" for position, i in enumerate(ids)]
    code, _ = pd.factorize(np.array(keys, dtype=object))
    first = np.unique(code, return_index=True)[1]
    to_gene = sp.csr_matrix((np.ones(len(code), np.float32), (np.arange(len(code)), code)))
    var = pd.DataFrame({"gene_id": ids, "gene_symbol": symbols}, index=cells.var_names).iloc[first]
    renamed = AnnData(sp.csr_matrix(cells.X @ to_gene, dtype=np.float32), obs=cells.obs.copy(), var=var)
    for key, values in cells.obsm.items():
        renamed.obsm[key] = values
    return renamed
