"""Strict JSON and the gene table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract import strict_json
from service.contract.gene_table import GeneTable
from tests.builders import gene_table


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1", "line 1 column"),
        (b"[1] x", "Extra data"),
        (b"\xef\xbb\xbf[]", "BOM"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 500 + b"]", "500 digits"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_refused(content: bytes, found: str) -> None:
    """Each way in which JSON can be wrong is said."""
    with pytest.raises(ValueError, match=found):
        strict_json.loads(content)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_that_is_right(value: object) -> None:
    """What json writes is read back."""
    import json

    assert strict_json.loads(json.dumps(value).encode()) == value


def test_gene_table_round_trip() -> None:
    """A table is read back as it was written, weights bit for bit."""
    table = gene_table()
    again = GeneTable.parse(table.dump())

    assert (again.gene_id, again.gene_symbol, again.aliases) == (table.gene_id, table.gene_symbol, table.aliases)
    assert again.encoder_weight.tobytes() == table.encoder_weight.tobytes()
    assert again.dump() == table.dump()


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_weights_survive(weights: list[float]) -> None:
    """Any float32 weight is written exactly."""
    table = GeneTable(
        gene_id=tuple(map(str, range(len(weights)))),
        gene_symbol=("",) * len(weights),
        aliases=((),) * len(weights),
        encoder_weight=np.array(weights, dtype=np.float32),
    )
    assert GeneTable.parse(table.dump()).encoder_weight.tobytes() == table.encoder_weight.tobytes()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"gene_id\tsymbol\n", "header"),
        (b"gene_id\tgene_symbol\taliases\tencoder_weight\nA\tB\n", "line 2"),
        (b"gene_id\tgene_symbol\taliases\tencoder_weight\n\tB\t\t0\n", "line 2"),
        (b"gene_id\tgene_symbol\taliases\tencoder_weight\nA\tB\t\t0\nA\tC\t\t0\n", "gene_id occurs twice"),
        (b"gene_id\tgene_symbol\taliases\tencoder_weight\nA\tB\t\t0\nC\tB\t\t0\n", "gene_symbol occurs twice"),
        (b"gene_id\tgene_symbol\taliases\tencoder_weight\nA\tB\t\tnan\n", "not finite"),
        (b"gene_id\tgene_symbol\taliases\tencoder_weight\nA\tB\t\tmuch\n", "could not convert"),
    ],
)
def test_gene_tables_that_are_wrong(content: bytes, found: str) -> None:
    """A table that is not as documented is refused with the line or the reason."""
    with pytest.raises(ValueError, match=found):
        GeneTable.parse(content)
