"""Splits: stratified, repeatable, and they read back."""

from collections import Counter

import numpy as np
import pandas as pd
from anndata import AnnData

from training.data.splits import PARTS, PUBLISHED, TEST, TRAIN, VALIDATION, Split, split_cells


def cells(n_cells: int = 200, n_published: int = 0) -> AnnData:
    """Cells of which the first were published as a test set."""
    published = ["test"] * n_published + ["train"] * (n_cells - n_published)
    obs = pd.DataFrame({"published_split": published}, index=[f"cell{i}" for i in range(n_cells)])
    return AnnData(np.zeros((n_cells, 1), np.float32), obs=obs)


def test_each_stratum_is_split_alike() -> None:
    """20 % and 10 % of each stratum, rounded, and at least one."""
    strata = ["common"] * 190 + ["rare"] * 10
    split = split_cells(cells(), strata, 0.2, 0.1, seed=0)
    found = Counter(zip(strata, split.part.values(), strict=True))
    assert found == {
        ("common", TEST): 38, ("common", VALIDATION): 19, ("common", TRAIN): 133,
        ("rare", TEST): 2, ("rare", VALIDATION): 1, ("rare", TRAIN): 7,
    }  # fmt: skip


def test_published_test_cells_are_drawn_for_nothing_else() -> None:
    """They are a part of their own."""
    split = split_cells(cells(n_published=50), ["x"] * 200, 0.2, 0.1, seed=0)
    assert [name for name, part in split.part.items() if part == PUBLISHED] == [f"cell{i}" for i in range(50)]
    assert Counter(split.part.values())[TEST] == 30


def test_the_seed_decides() -> None:
    """The same seed gives the same cells, another one others."""
    draws = [split_cells(cells(), ["x"] * 200, 0.2, 0.1, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_stratum_of_two_is_trained_on() -> None:
    """There is nothing to hold out of it."""
    assert set(split_cells(cells(2), ["x", "x"], 0.2, 0.1, 0).part.values()) == {TRAIN}


def test_a_split_reads_back_and_finds_its_cells() -> None:
    """Positions are those of the cells in whatever order they now stand."""
    split = split_cells(cells(), ["x"] * 200, 0.2, 0.1, seed=0)
    again = Split.parse(split.dump())
    assert again.part == split.part
    turned = cells()[::-1]
    positions = again.positions(turned, TEST)
    assert {turned.obs_names[i] for i in positions} == {name for name, part in split.part.items() if part == TEST}
    assert sum(len(split.positions(turned, part)) for part in PARTS) == 200
