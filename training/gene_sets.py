"""Gene sets from GMT files, and whether a set's genes matter more than others: an exact test, corrected for the number of sets."""

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from service.contract.gene_table import GeneTable
from service.contract.manifest import GeneSetFile
from training.data import registry

REGISTERED = "gene_sets"
"""Data set of the registry that holds GMT files."""


class NoGeneSets(Exception):
    """A file of gene sets is neither registered nor there, or holds none."""


@dataclass(frozen=True)
class GeneSets:
    """Sets of the model's genes."""

    names: tuple[str, ...]
    members: tuple[NDArray[np.int64], ...]
    """Positions of each set's genes in the model, ascending."""

    files: tuple[GeneSetFile, ...]


def read(names: Sequence[str], genes: GeneTable, min_genes: int, max_genes: int) -> GeneSets:
    """The sets of some GMT files (Broad's format: name, description, symbols; tab-separated), perhaps gzipped, over the model's genes.

    Args:
        names: registered files by their name without folder, or paths.
        genes: of the model; a set's genes are found by symbol, alias or id, and those that the model lacks are left out.
        min_genes: sets with fewer genes in the model are left out.
        max_genes: likewise with more.

    Raises:
        NoGeneSets: there is no such file, or nothing in it.
        as `registry.fetch` does.
    """
    position: dict[str, int] = {}
    for i, names_of_gene in enumerate(zip(genes.gene_symbol, genes.gene_id, strict=True)):
        position |= {name: i for name in names_of_gene if name}
    for i, aliases in enumerate(genes.aliases):
        for alias in aliases:
            position.setdefault(alias, i)
    found: dict[str, NDArray[np.int64]] = {}
    files = []
    for name in names:
        path, licence = _locate(name)
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        rows = [line.split("\t") for line in text.splitlines() if line.count("\t") > 1]
        if not rows:
            raise NoGeneSets(
                f"{path} holds no gene set: each line must have a name, a description and genes, tab-separated."
            )
        # Enrichr writes "gene,weight".
        sets = {
            row[0]: sorted({position[g] for g in (gene.split(",")[0] for gene in row[2:]) if g in position})
            for row in rows
        }
        kept = {name: np.array(members) for name, members in sets.items() if min_genes <= len(members) <= max_genes}
        found |= kept
        files.append(
            GeneSetFile(name=path.name, sha256=hashlib.sha256(content).hexdigest(), licence=licence, n_sets=len(kept))
        )
    return GeneSets(tuple(found), tuple(found.values()), tuple(files))


def medians(values: NDArray[np.float64], members: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """The (lower) median of each set's genes, (n_rows, n_sets), of values (n_rows, n_genes)."""
    rows = [np.sort(values[:, genes], axis=1)[:, (len(genes) - 1) // 2] for genes in members]
    return np.stack(rows, axis=1) if rows else np.zeros((len(values), 0))


def p_values(values: NDArray[np.float64], members: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Two-sided p of each set's median against all sets of its size drawn from the model's genes, (n_rows, n_sets).

    What a permutation test would draw is known in closed form: the r-th smallest of k genes drawn from n is at most t exactly if r or
    more of them are, and how many are is hypergeometric. So this is the permutation test with all permutations, and p has no floor.

    Args:
        values: of the genes, (n_rows, n_genes).
        members: positions of each set's genes.
    """
    n_genes = values.shape[1]
    ordered = np.sort(values, axis=1)
    found = medians(values, members)
    result = np.ones_like(found)
    for j, genes in enumerate(members):
        k, rank = len(genes), (len(genes) - 1) // 2 + 1
        for i, t in enumerate(found[:, j]):
            n_least = np.searchsorted(ordered[i], t, side="right")
            n_most = n_genes - np.searchsorted(ordered[i], t, side="left")
            is_low = stats.hypergeom.sf(rank - 1, n_genes, n_least, k)
            is_high = stats.hypergeom.sf(k - rank, n_genes, n_most, k)
            result[i, j] = min(1.0, 2 * min(is_low, is_high))
    return result


def q_values(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Benjamini and Hochberg's false discovery rate over the sets of each row, (n_rows, n_sets)."""
    return np.stack([stats.false_discovery_control(row) for row in p]) if p.size else p


def _locate(name: str) -> tuple[Path, str]:
    registered = registry.find(REGISTERED)
    for file in registered.files:
        if Path(file.name).name == name:
            return registry.fetch(file), registered.licence
    path = Path(name)
    if not path.is_file():
        known = ", ".join(Path(file.name).name for file in registered.files)
        raise NoGeneSets(f"'{name}' is neither a file nor one of the registered ones: {known}.")
    return path, "unknown"
