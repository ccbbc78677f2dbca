"""genes.tsv: the genes of a model in graph order, with their names and how much the encoder makes of each."""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SEPARATORS = re.compile(r"[\t\n]")
HEADER = ("gene_id", "gene_symbol", "aliases", "encoder_weight")


@dataclass(frozen=True)
class GeneTable:
    """The model's genes; all columns have one entry per gene, in graph order."""

    gene_id: tuple[str, ...]
    """Ensembl ids without version, or symbols where `id_type` of the manifest is "symbol". Unique."""

    gene_symbol: tuple[str, ...]
    """HGNC (or the species' own) symbols as the training data wrote them. Unique; empty where there is none."""

    aliases: tuple[tuple[str, ...], ...]
    """Other names that mean this gene and no other gene of the table."""

    encoder_weight: NDArray[np.float32]
    """Share of the encoder's first layer that the gene holds, shape (n_genes,), summing to 1."""

    def __post_init__(self) -> None:
        n_genes = len(self.gene_id)
        if not n_genes == len(self.gene_symbol) == len(self.aliases) == len(self.encoder_weight):
            raise ValueError("the columns of the gene table differ in length")
        if not all(self.gene_id) or not all(alias for aliases in self.aliases for alias in aliases):
            raise ValueError("a gene_id or an alias is empty")
        for name in (*self.gene_id, *self.gene_symbol):
            if _SEPARATORS.search(name):
                raise ValueError(f"the name {name[:40]!r} holds a character that separates names in the table")
        if any(_SEPARATORS.search(alias) or "|" in alias for aliases in self.aliases for alias in aliases):
            raise ValueError("an alias holds a character that separates names in the table")
        if len(set(self.gene_id)) != n_genes:
            raise ValueError("a gene_id occurs twice")
        symbols = [symbol for symbol in self.gene_symbol if symbol]
        if len(set(symbols)) != len(symbols):
            raise ValueError("a gene_symbol occurs twice")
        if not (np.isfinite(self.encoder_weight).all() and (self.encoder_weight >= 0).all()):
            raise ValueError("an encoder_weight is negative or not finite")

    def __len__(self) -> int:
        return len(self.gene_id)

    @property
    def digest(self) -> str:
        """sha256 of the gene ids in order, newline-joined."""
        return hashlib.sha256("\n".join(self.gene_id).encode()).hexdigest()

    @classmethod
    def parse(cls, content: bytes) -> "GeneTable":
        """Read genes.tsv.

        Raises:
            ValueError: with the line, where the table is not as documented.
        """
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
        if tuple(lines[0].split("\t")) != HEADER:
            raise ValueError(f"line 1 must be the header {' '.join(HEADER)}")
        rows = [line.split("\t") for line in lines[1:]]
        for number, row in enumerate(rows, start=2):
            if len(row) != len(HEADER) or not row[0]:
                raise ValueError(f"line {number} must have {len(HEADER)} tab-separated columns, the first not empty")
        return cls(
            gene_id=tuple(row[0] for row in rows),
            gene_symbol=tuple(row[1] for row in rows),
            aliases=tuple(tuple(alias for alias in row[2].split("|") if alias) for row in rows),
            encoder_weight=np.array([float(row[3]) for row in rows], dtype=np.float32),
        )

    def dump(self) -> bytes:
        """The bytes of genes.tsv; `parse` gives the table back."""
        rows = zip(self.gene_id, self.gene_symbol, self.aliases, self.encoder_weight, strict=True)
        lines = ["\t".join(HEADER)]
        lines += [
            f"{gene_id}\t{symbol}\t{'|'.join(aliases)}\t{np.format_float_positional(weight)}"
            for gene_id, symbol, aliases, weight in rows
        ]
        return ("\n".join(lines) + "\n").encode()
