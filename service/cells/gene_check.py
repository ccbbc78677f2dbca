"""What would happen to a list of genes, in full: nothing is refused here, and nothing is cut short."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.cells.genes import GeneIndex
from service.cells.species import guess_species

N_UNKNOWN_LISTED = 100


def check_genes(index: GeneIndex, genes: tuple[str, ...]) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Everything that is known about a list of genes and a model, as plain values.

    Returns:
        The answer of POST /v1/genes/check without its head, and the positions of the model's genes that are missing.
    """
    positions, species = index.positions(genes), guess_species(genes)
    report = index.report(genes, positions, species, n_listed=max(len(genes), len(index.table)))
    refused = index.refusal(genes, positions, report, species)
    table = index.table
    columns: defaultdict[int, list[str]] = defaultdict(list)
    for gene, at in zip(genes, positions, strict=True):
        if at >= 0:
            columns[int(at)].append(gene)
    missing = np.array([at for at in range(len(table)) if at not in columns], dtype=np.int64)
    missing = missing[np.argsort(-table.encoder_weight[missing], kind="stable")]
    unknown = [gene for gene, at in zip(genes, positions, strict=True) if at < 0]
    return {
        "is_refused": refused is not None,
        "problem": {"code": refused.code, "detail": refused.detail} if refused else None,
        "n_model_genes": report.n_model_genes,
        "n_query_genes": report.n_query_genes,
        "gene_overlap": report.gene_overlap,
        "min_gene_overlap": index.min_gene_overlap,
        "id_type": report.id_type,
        "species": {
            "guess": species.guess,
            "share": species.share,
            "evidence": list(species.evidence),
            "model": index.species,
            "is_mismatch": species.contradicts(index.species),
        },
        "n_matched": report.n_matched,
        "matched_by": _matched_by(index, genes, positions),
        "renamed": report.renamed,
        "duplicated": {index.display(at): names for at, names in columns.items() if len(names) > 1},
        "ambiguous": {
            gene: {"may_mean": list(meant), "is_symbol_of_another_gene": index.ambiguous_names[gene].is_symbol}
            for gene, meant in report.ambiguous.items()
        },
        "suspect": list(report.suspect),
        "n_missing": report.n_missing,
        "missing": [
            {"gene_id": table.gene_id[i], "gene_symbol": table.gene_symbol[i], "weight": float(table.encoder_weight[i])}
            for i in missing
        ],
        "missing_weight": report.missing_weight,
        "missing_effect": asdict(report.missing_effect) if report.missing_effect else None,
        "n_unknown": len(unknown),
        "unknown_examples": unknown[:N_UNKNOWN_LISTED],
    }, missing


def _matched_by(index: GeneIndex, genes: Sequence[str], positions: NDArray[np.int32]) -> dict[str, int]:
    """Number of sent names by what they were matched as."""
    ids, symbols = frozenset(index.table.gene_id), frozenset(index.table.gene_symbol)
    aliases = frozenset(alias for names in index.table.aliases for alias in names)

    def kind(gene: str) -> str:
        if gene in ids:
            return "id"
        if gene in symbols:
            return "symbol"
        return "alias" if gene in aliases else "id_without_version"

    found = Counter(kind(gene) for gene, at in zip(genes, positions, strict=True) if at >= 0)
    return {name: found[name] for name in ("id", "id_without_version", "symbol", "alias")}
