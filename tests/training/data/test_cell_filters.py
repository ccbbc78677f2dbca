"""Cell filters: every bound has an effect, bounds are inclusive, and nothing left is an error."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from training.config import CellFilter
from training.data.cell_filters import NoCells, keep_cells, measure_cells
from training.data.reference import load_reference

COUNTS = np.array([[5, 0, 0], [1, 1, 0], [1, 1, 8], [0, 0, 0]], np.float32)


def cells() -> AnnData:
    """Four cells; the last gene is mitochondrial."""
    obs = pd.DataFrame({"kind": ["B", "B", "T", "doublet"], "batch": "x"}, index=list("abcd"))
    var = pd.DataFrame({"gene_id": "", "gene_symbol": ["CD3D", "ACTB", "mt-Co1"]}, index=list("xyz"))
    return AnnData(sp.csr_matrix(COUNTS), obs=obs, var=var)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ({}, "abcd"),
        ({"min_counts": 5}, "ac"),
        ({"max_counts": 5}, "abd"),
        ({"min_genes": 2}, "bc"),
        ({"max_genes": 1}, "ad"),
        ({"max_mitochondrial": 0.8}, "abcd"),
        ({"max_mitochondrial": 0.79}, "abd"),
        ({"keep": {"kind": ["B"]}}, "ab"),
        ({"drop": {"kind": ["doublet", "T"]}}, "ab"),
        ({"keep": {"kind": ["B"]}, "min_genes": 2}, "b"),
    ],
)
def test_each_bound(wanted: dict[str, object], kept: str) -> None:
    """Which cells pass."""
    found = keep_cells(cells(), CellFilter.model_validate(wanted), "mine", seed=0)
    assert "".join(cells().obs_names[found]) == kept


def test_a_draw_of_cells_follows_the_seed() -> None:
    """After the other filters, and in the order of the file."""
    wanted = CellFilter(max_cells=2, drop={"kind": ("doublet",)})
    draws = [tuple(keep_cells(cells(), wanted, "mine", seed)) for seed in range(20)]
    assert all(sum(draw) == 2 and not draw[3] for draw in draws)
    assert len(set(draws)) == 3
    assert draws[0] == tuple(keep_cells(cells(), wanted, "mine", 0))


def test_figures_of_cells() -> None:
    """Counts, genes and mitochondrial counts as numpy has them."""
    counts, genes, mitochondrial = measure_cells(cells())
    np.testing.assert_array_equal(counts, COUNTS.sum(axis=1))
    np.testing.assert_array_equal(genes, (COUNTS > 0).sum(axis=1))
    np.testing.assert_array_equal(mitochondrial, COUNTS[:, 2])


def test_nothing_left_and_nothing_to_look_at() -> None:
    """Both are said with the name of the data set."""
    with pytest.raises(NoCells, match="None of the 4 cells of 'mine'"):
        keep_cells(cells(), CellFilter(min_counts=1e6), "mine", 0)
    with pytest.raises(NoCells, match=r"no column 'type' in obs.*kind, batch"):
        keep_cells(cells(), CellFilter(keep={"type": ("B",)}), "mine", 0)


def test_a_filter_of_the_configuration_is_used(tiny_sets: None) -> None:
    """By every data set of the run."""
    everything = load_reference(("tiny_a", "tiny_b"))
    found = load_reference(("tiny_a", "tiny_b"), CellFilter(keep={"cell_type": ("NK",)}))
    assert list(found.obs_names) == list(everything.obs_names[everything.obs["cell_type"] == "NK"])
