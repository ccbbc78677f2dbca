"""The gene table of an artifact: what else each gene is called, and how much the encoder makes of it."""

import csv
import gzip
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from service.contract.ambiguous_names import Ambiguous
from service.contract.gene_table import GeneTable
from training.data import registry
from training.data.prepared import Prepared
from training.families.family import Family


@dataclass(frozen=True)
class HgncGene:
    """A gene as the HUGO Gene Nomenclature Committee lists it."""

    symbol: str
    gene_id: str
    other: tuple[str, ...]
    """Previous and alias symbols."""


def read_hgnc(path: Path) -> list[HgncGene]:
    """The approved genes of hgnc_complete_set.txt.gz."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["status"] == "Approved"]
    return [
        HgncGene(
            symbol=row["symbol"],
            gene_id=row["ensembl_gene_id"] or "",
            other=tuple(
                name for key in ("prev_symbol", "alias_symbol") for name in (row[key] or "").split("|") if name
            ),
        )
        for row in rows
    ]


def find_aliases(
    gene_id: Sequence[str], gene_symbol: Sequence[str], hgnc: Sequence[HgncGene]
) -> tuple[tuple[str, ...], ...]:
    """Other names of each gene that can mean no other gene.

    A name is left out if it is the approved symbol of another gene, if two genes of HGNC claim it, or if it names any gene of the table.

    Args:
        gene_id: Ensembl ids; where they are not, only symbols are compared.
        gene_symbol: as the training data write them, perhaps outdated, perhaps empty.
        hgnc: all approved genes.
    """
    by_id = {gene.gene_id: gene for gene in hgnc if gene.gene_id}
    by_symbol = {gene.symbol: gene for gene in hgnc}
    claims = Counter(name for gene in hgnc for name in {*gene.other, gene.symbol})
    taken = {*gene_id, *gene_symbol}
    found = [by_id.get(i) or by_symbol.get(symbol) for i, symbol in zip(gene_id, gene_symbol, strict=True)]
    # Two rows of the table that HGNC takes for one gene: neither may have its names.
    n_rows = Counter(gene.symbol for gene in found if gene)
    return tuple(
        tuple(
            name
            for name in dict.fromkeys((gene.symbol, *gene.other))
            if name not in taken and claims[name] == 1 and by_symbol.get(name, gene) is gene
        )
        if gene and n_rows[gene.symbol] == 1
        else ()
        for gene in found
    )


def find_ambiguous(
    gene_id: Sequence[str], gene_symbol: Sequence[str], hgnc: Sequence[HgncGene]
) -> dict[str, Ambiguous]:
    """Names that HGNC lists for genes of the table and that `find_aliases` leaves out, with the reason. Arguments as there."""
    by_id = {gene.gene_id: gene for gene in hgnc if gene.gene_id}
    by_symbol = {gene.symbol: gene for gene in hgnc}
    taken = {*gene_id, *gene_symbol}
    meant: dict[str, list[str]] = {}
    is_symbol: set[str] = set()
    accepted = find_aliases(gene_id, gene_symbol, hgnc)
    for row, symbol, aliases in zip(gene_id, gene_symbol, accepted, strict=True):
        gene = by_id.get(row) or by_symbol.get(symbol)
        if gene is None:
            continue
        for name in dict.fromkeys((gene.symbol, *gene.other)):
            if name not in taken and name not in aliases:
                meant.setdefault(name, []).append(row)
                if by_symbol.get(name, gene) is not gene:
                    is_symbol.add(name)
    return {name: Ambiguous(tuple(rows), name in is_symbol) for name, rows in meant.items()}


def encoder_weight(family: Family, prepared: Prepared) -> np.ndarray:
    """Share of the encoder's first layer that each gene holds: norm of its weights times its deviation in training cells, summing to 1."""
    with torch.no_grad():
        norm = family.gene_weight().norm(dim=0).double().numpy()
    weight = norm * prepared.statistics.std.double().numpy()
    return (weight / weight.sum()).astype(np.float32)


def gene_table(family: Family, prepared: Prepared, species: str) -> tuple[GeneTable, dict[str, Ambiguous]]:
    """The gene table of a fitted model, and names that it does not take; aliases are known for human genes only.

    Raises:
        as `registry.fetch` does, for HGNC's table.
    """
    symbols = prepared.var["gene_symbol"].astype(str).tolist()
    ids = prepared.var["gene_id"].astype(str).tolist() if has_ensembl_ids(prepared) else list(prepared.var.index)
    aliases: tuple[tuple[str, ...], ...] = ((),) * len(ids)
    ambiguous: dict[str, Ambiguous] = {}
    if species == "homo_sapiens":
        files = registry.fetch_all(registry.find("hgnc"))
        hgnc = read_hgnc(files["hgnc_complete_set.txt.gz"])
        aliases, ambiguous = find_aliases(ids, symbols, hgnc), find_ambiguous(ids, symbols, hgnc)
    return GeneTable(tuple(ids), tuple(symbols), aliases, encoder_weight(family, prepared)), ambiguous


def has_ensembl_ids(prepared: Prepared) -> bool:
    """Whether every gene has an Ensembl id."""
    return bool((prepared.var["gene_id"] != "").all())
