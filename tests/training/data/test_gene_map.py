"""Symbols become HGNC's ids; what is ambiguous stays, and columns of one gene are summed."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from tests.training.tiny import read_or_skip
from training.data.gene_map import gene_by_name, rename
from training.data.reference import load_reference
from training.gene_names import HgncGene

HGNC = [
    HgncGene("SEPTIN1", "ENSG1", ("SEPT1", "DIFF6")),
    HgncGene("CD3D", "ENSG2", ("T3D", "SHARED")),
    HgncGene("MS4A1", "ENSG3", ("CD20", "SHARED")),
    HgncGene("NOID", "", ("OLD",)),
]


def test_a_name_means_one_gene() -> None:
    """The approved symbol wins, a name that two genes claim means none, and so does a gene without an id."""
    known = {name: gene.gene_id for name, gene in gene_by_name([*HGNC, HgncGene("T3D", "ENSG4", ())]).items()}
    assert known == {
        "SEPTIN1": "ENSG1", "SEPT1": "ENSG1", "DIFF6": "ENSG1", "CD3D": "ENSG2", "MS4A1": "ENSG3", "CD20": "ENSG3", "T3D": "ENSG4",
    }  # fmt: skip


def test_columns_of_one_gene_are_summed() -> None:
    """In the order in which genes first come; unknown names stay as they are, ids are left alone, cells keep their columns."""
    symbols, ids = ["SEPT1", "SHARED", "CD3D", "SEPTIN1", "SHARED"], ["", "", "ENSG9", "", ""]
    var = pd.DataFrame({"gene_id": ids, "gene_symbol": symbols}, index=list("abcde"))
    counts = sp.csr_matrix(np.array([[1, 2, 3, 10, 5]], np.float32))
    found = rename(AnnData(counts, obs=pd.DataFrame({"kind": ["B"]}, index=["cell"]), var=var), gene_by_name(HGNC))
    assert list(zip(found.var["gene_id"], found.var["gene_symbol"], strict=True)) == [
        ("ENSG1", "SEPTIN1"), ("", "SHARED"), ("ENSG9", "CD3D"), ("", "SHARED"),
    ]  # fmt: skip
    np.testing.assert_array_equal(found.X.toarray(), [[11, 2, 3, 5]])
    assert found.obs["kind"].tolist() == ["B"]


def test_published_symbols_find_their_ids() -> None:
    """Of pbmc3k's 13,714 symbols, old ones among them, nine in ten have an id today; the others are left out, as of any set with ids."""
    read_or_skip("pbmc3k")
    plain, mapped = load_reference(("pbmc3k",)), load_reference(("pbmc3k",), map_symbols=True)
    assert (mapped.var["gene_id"] != "").all()
    assert 0.9 < mapped.n_vars / plain.n_vars < 1
    assert mapped.X.sum() == pytest.approx(plain.X.sum(), rel=0.05)
