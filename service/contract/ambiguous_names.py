"""reference/ambiguous_names.tsv: names that might mean a gene of the model and are not taken for it, so that a report can say why."""

from collections.abc import Mapping
from dataclasses import dataclass

HEADER = ("name", "gene_ids", "is_symbol")


@dataclass(frozen=True)
class Ambiguous:
    """Why a name is not taken."""

    gene_ids: tuple[str, ...]
    """Genes of the model of which it is a previous symbol or an alias."""

    is_symbol: bool
    """It is the approved symbol of a gene that is none of these. Otherwise several genes claim it."""


def parse(content: bytes) -> dict[str, Ambiguous]:
    """Read the table.

    Raises:
        ValueError: with the line, where it is not as documented.
    """
    lines = content.decode("utf-8").removesuffix("\n").split("\n")
    if tuple(lines[0].split("\t")) != HEADER:
        raise ValueError(f"line 1 must be the header {' '.join(HEADER)}")
    names = {}
    for number, line in enumerate(lines[1:], start=2):
        row = line.split("\t")
        if len(row) != len(HEADER) or not all(row) or row[2] not in ("true", "false"):
            raise ValueError(f"line {number} must have a name, gene ids joined by '|', and true or false")
        names[row[0]] = Ambiguous(tuple(row[1].split("|")), row[2] == "true")
    return names


def dump(names: Mapping[str, Ambiguous]) -> bytes:
    """The bytes of the table; `parse` gives it back."""
    rows = [f"{name}\t{'|'.join(why.gene_ids)}\t{str(why.is_symbol).lower()}" for name, why in sorted(names.items())]
    return ("\n".join(["\t".join(HEADER), *rows]) + "\n").encode()
