"""Aliases: only names that can mean no other gene."""

from pathlib import Path

import numpy as np
import pytest

from service.contract.ambiguous_names import Ambiguous
from training import run
from training.data import registry
from training.gene_names import HgncGene, encoder_weight, find_aliases, find_ambiguous, read_hgnc


def test_old_and_other_symbols_are_found() -> None:
    """A gene is recognised by its id, or without one by its symbol; its approved symbol is an alias of an outdated one."""
    hgnc = [HgncGene("NEW", "E1", ("OLD", "OTHER")), HgncGene("B", "", ("B1",))]
    assert find_aliases(["E1", "E2"], ["OLD", "B"], hgnc) == (("NEW", "OTHER"), ("B1",))


@pytest.mark.parametrize(
    "other",
    [
        HgncGene("SHARED", "E9", ()),  # an approved symbol of another gene
        HgncGene("C", "E9", ("SHARED",)),  # claimed by two
    ],
)
def test_a_name_of_two_genes_is_left_out(other: HgncGene) -> None:
    """Whether or not the other gene is in the table."""
    hgnc = [HgncGene("A", "E1", ("SHARED", "MINE")), other]
    assert find_aliases(["E1"], ["A"], hgnc) == (("MINE",),)


def test_a_name_that_is_in_the_table_is_left_out() -> None:
    """The table's own names win, even outdated ones."""
    hgnc = [HgncGene("A", "E1", ("B",))]
    assert find_aliases(["E1", "E2"], ["A", "B"], hgnc) == ((), ())


def test_two_rows_of_one_gene_get_no_aliases() -> None:
    """HGNC takes them for one; which of the two is meant cannot be known."""
    hgnc = [HgncGene("A", "E1", ("X",))]
    assert find_aliases(["E1", "E2"], ["OLD", "A"], hgnc) == ((), ())


def test_names_that_are_left_out_have_a_reason() -> None:
    """Claimed by several genes, or the symbol of another gene; what is an alias or in the table is not among them."""
    hgnc = [
        HgncGene("A", "E1", ("BOTH", "OWN", "MINE", "B")),
        HgncGene("B", "E2", ("BOTH",)),
        HgncGene("OWN", "E9", ("FAR",)),
    ]
    assert find_ambiguous(["E1", "E2"], ["A", "B"], hgnc) == {
        "BOTH": Ambiguous(("E1", "E2"), is_symbol=False),
        "OWN": Ambiguous(("E1",), is_symbol=True),
    }
    assert find_aliases(["E1", "E2"], ["A", "B"], hgnc)[0] == ("MINE",)


def test_hgnc_is_read() -> None:
    """Known renamings of blood genes are in it."""
    try:
        path = registry.fetch_all(registry.find("hgnc"))["hgnc_complete_set.txt.gz"]
    except registry.NetworkUnavailable as error:
        pytest.skip(str(error))
    genes = {gene.symbol: gene for gene in read_hgnc(path)}
    assert len(genes) > 40_000
    assert genes["MS4A1"].gene_id == "ENSG00000156738"
    assert "CD20" in genes["MS4A1"].other


def test_encoder_weights_are_shares(family_run: tuple[run.Run, Path]) -> None:
    """Not negative, and they sum to 1."""
    weight = encoder_weight(family_run[0].family, family_run[0].prepared)
    assert weight.shape == (40,)
    assert (weight >= 0).all()
    np.testing.assert_allclose(weight.sum(), 1, rtol=1e-5)
