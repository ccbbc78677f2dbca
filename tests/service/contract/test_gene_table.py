"""genes.tsv: a table of any names is read back as it was, and a damaged one is refused with its line."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.gene_table import HEADER, GeneTable
from tests.builders import gene_table

WORD = st.text(st.characters(codec="utf-8", exclude_characters="\t\n|"), min_size=1, max_size=12)


def table(**changes: object) -> GeneTable:
    columns = {
        "gene_id": ("A", "B"),
        "gene_symbol": ("a", "b"),
        "aliases": (("x", "y"), ()),
        "encoder_weight": np.array([0.25, 0.75], dtype=np.float32),
    }
    return GeneTable(**(columns | changes))  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(WORD, min_size=1, max_size=8, unique=True), aliases=st.lists(st.lists(WORD, max_size=3), max_size=8)
)
def test_names_survive(names: list[str], aliases: list[list[str]]) -> None:
    """Any names without tab, line break and bar come back, as do empty symbols."""
    written = GeneTable(
        gene_id=tuple(names),
        gene_symbol=tuple(name if number % 2 else "" for number, name in enumerate(names)),
        aliases=tuple(tuple(words) for words in (aliases + [[]] * len(names))[: len(names)]),
        encoder_weight=np.full(len(names), 1 / len(names), dtype=np.float32),
    )
    read = GeneTable.parse(written.dump())

    assert (read.gene_id, read.gene_symbol, read.aliases) == (written.gene_id, written.gene_symbol, written.aliases)
    assert read.digest == written.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"aliases": (("x|y",), ())},
        {"aliases": (("x\ty",), ())},
        {"aliases": (("",), ())},
        {"gene_symbol": ("a\tb", "b")},
        {"gene_id": ("A\n", "B")},
        {"gene_id": ("", "B")},
    ],
)
def test_names_that_a_table_cannot_hold(changes: dict[str, object]) -> None:
    """A name that would come back as another is refused when the table is made, or at the latest when it is written."""
    with pytest.raises(ValueError, match=r"."):
        table(**changes).dump()


@pytest.mark.parametrize(
    "changes",
    [
        {"gene_id": ("A",)},
        {"gene_symbol": ("a", "b", "c")},
        {"aliases": ((),)},
        {"encoder_weight": np.ones(3, dtype=np.float32)},
    ],
)
def test_columns_of_one_length(changes: dict[str, object]) -> None:
    """Columns that differ in length are no table."""
    with pytest.raises(ValueError, match="differ in length"):
        table(**changes)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, -0.1])
def test_weights_are_shares(weight: float) -> None:
    """A negative or infinite share of the encoder is refused."""
    with pytest.raises(ValueError, match="negative or not finite"):
        table(encoder_weight=np.array([0.5, weight], dtype=np.float32))


def test_genes_without_a_symbol() -> None:
    """The empty symbol may occur any number of times; it is none."""
    assert GeneTable.parse(table(gene_symbol=("", "")).dump()).gene_symbol == ("", "")


def test_the_digest_is_of_ids_in_their_order() -> None:
    """Two models with one digest take the same columns: order counts, names and weights do not."""
    assert table().digest == hashlib.sha256(b"A\nB").hexdigest()
    assert table(gene_id=("B", "A")).digest != table().digest
    assert table(gene_symbol=("", ""), aliases=((), ())).digest == table().digest


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (b"\n", b"\r\n", "line 1"),
        (b"gene_id", b"\xef\xbb\xbfgene_id", "line 1"),
        (b"G7\t", b"G7\t\t", "line 9"),
        (b"ENSG00000000007\t", b"\t", "line 9"),
        (b"ENSG00000000007\t", b"\nENSG00000000007\t", "line 9"),
    ],
)
def test_the_line_is_named(old: bytes, new: bytes, line: str) -> None:
    """Line ends of Windows, a byte order mark, a column too many, and empty lines are refused with their line."""
    content = gene_table().dump()
    assert old in content
    with pytest.raises(ValueError, match=rf"{line}\b"):
        GeneTable.parse(content.replace(old, new))


def test_a_table_of_no_genes() -> None:
    """A header alone is a table of no genes; what the manifest says of it decides."""
    assert len(GeneTable.parse(("\t".join(HEADER) + "\n").encode())) == 0
    with pytest.raises(ValueError, match="line 1"):
        GeneTable.parse(b"")
