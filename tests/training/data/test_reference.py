"""Joining data sets: Ensembl ids are kept, symbols find theirs, and what is ambiguous is left out."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from tests.training.tiny import read_or_skip
from training.data import reference


def cells(genes: list[tuple[str, str]], counts: list[int]) -> AnnData:
    """One cell with genes given as (id, symbol)."""
    var = pd.DataFrame(genes, columns=["gene_id", "gene_symbol"], index=[f"{i}" for i in range(len(genes))])
    obs = pd.DataFrame({"cell_type": ["B"], "published_split": ["train"]}, index=["cell"])
    return AnnData(sp.csr_matrix(np.array([counts], dtype=np.float32)), obs=obs, var=var)


def test_symbols_take_the_ids_of_the_set_that_has_both() -> None:
    """Order is that of the first set; each count stays with its gene."""
    joined = reference.join(
        {
            "a": cells([("E1", "CD3D"), ("E2", "MS4A1"), ("E3", "NKG7")], [1, 2, 3]),
            "b": cells([("", "NKG7"), ("", "CD3D"), ("", "OTHER")], [30, 10, 99]),
        }
    )
    assert list(joined.var["gene_id"]) == ["E1", "E3"]
    assert list(joined.var["gene_symbol"]) == ["CD3D", "NKG7"]
    np.testing.assert_array_equal(joined.X.toarray(), [[1, 3], [10, 30]])
    assert list(joined.obs_names) == ["a/cell", "b/cell"]
    assert list(joined.obs["dataset"]) == ["a", "b"]


def test_an_ambiguous_symbol_joins_nothing() -> None:
    """A symbol of two ids could be either."""
    joined = reference.join(
        {
            "a": cells([("E1", "X"), ("E2", "X"), ("E3", "NKG7")], [1, 2, 3]),
            "b": cells([("", "X"), ("", "NKG7")], [5, 6]),
        }
    )
    assert list(joined.var["gene_id"]) == ["E3"]


def test_sets_without_ids_join_by_symbol() -> None:
    """Then there are no ids to keep."""
    joined = reference.join({"a": cells([("", "X"), ("", "Y")], [1, 2]), "b": cells([("", "Y")], [3])})
    assert list(joined.var["gene_id"]) == [""]
    assert list(joined.var["gene_symbol"]) == ["Y"]


def test_a_single_set_may_repeat_a_symbol() -> None:
    """Both genes stay, by id; the symbol names neither."""
    joined = reference.join({"a": cells([("E1", "X"), ("E2", "X")], [1, 2])})
    assert list(joined.var["gene_symbol"]) == ["", ""]


def test_nothing_in_common_is_an_error() -> None:
    """The sets are named."""
    with pytest.raises(reference.NoCommonGenes, match="a and b"):
        reference.join({"a": cells([("", "X")], [1]), "b": cells([("", "Y")], [1])})


def test_the_blood_reference() -> None:
    """Both halves of the default reference, 13,351 genes, eight broad types."""
    for name in ("pbmc_facs", "pbmc3k"):
        read_or_skip(name)
    joined = reference.load_reference(("pbmc_facs", "pbmc3k"))
    assert joined.shape == (6512, 13351)
    assert joined.var["gene_id"].str.fullmatch(r"ENSG\d{11}").all()
    assert joined.obs["cell_type"].nunique() == 8
    assert joined.var.loc[joined.var["gene_symbol"] == "CD3D", "gene_id"].tolist() == ["ENSG00000167286"]


def test_genes_can_be_prescribed() -> None:
    """The result has exactly these, in their order; what a set lacks counts zero, and its share is said; symbols take their ids."""
    genes = pd.DataFrame({"gene_id": ["E9", "E2", "E1"], "gene_symbol": ["GZMB", "MS4A1", "CD3D"]})
    sets = {
        "a": cells([("E1", "CD3D"), ("E2", "MS4A1"), ("E3", "NKG7")], [1, 2, 3]),
        "b": cells([("", "NKG7"), ("", "CD3D"), ("", "GZMB")], [30, 10, 99]),
        "c": cells([("E3", "NKG7")], [5]),
    }
    sets["a"].obsm["protein_counts"] = pd.DataFrame({"CD3": [7.0]}, index=["cell"])
    joined = reference.join(sets, genes)
    assert list(joined.var["gene_id"]) == ["E9", "E2", "E1"]
    np.testing.assert_array_equal(joined.X.toarray(), [[0, 2, 1], [99, 0, 10], [0, 0, 0]])
    assert joined.uns["gene_overlap"] == {"a": 2 / 3, "b": 2 / 3, "c": 0.0}
    assert joined.obsm["protein_counts"]["CD3"].isna().tolist() == [False, True, True]
