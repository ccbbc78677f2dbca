"""Splits: stratified, repeatable, and they read back."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from tests.training.tiny import tiny_cells, tiny_config
from training.data.prepared import prepare, split_reference
from training.data.reference import join
from training.data.splits import (
    PARTS,
    PUBLISHED,
    TEST,
    TRAIN,
    VALIDATION,
    Split,
    UnknownBatch,
    hold_out,
    split_cells,
)


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


def test_without_validation_cells_the_others_stay_where_they_are() -> None:
    """Test cells are the same; what would have been validation cells is trained on."""
    strata = ["common"] * 190 + ["rare"] * 10
    some, none = (split_cells(cells(), strata, 0.2, share, seed=0).part for share in (0.1, 0.0))
    assert none == {name: TRAIN if part == VALIDATION else part for name, part in some.items()}


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


def test_a_sequential_split_takes_the_last_cells() -> None:
    """Of each stratum, in the order of the file; nothing is drawn."""
    strata = ["a"] * 100 + ["b"] * 100
    parts = list(split_cells(cells(), strata, 0.2, 0.1, seed=0, is_sequential=True).part.values())
    expected = [TRAIN] * 70 + [VALIDATION] * 10 + [TEST] * 20
    assert parts == expected * 2


def two_sets() -> AnnData:
    """The tiny sets joined, each with two plates."""
    reference = join({name: tiny_cells(name) for name in ("tiny_a", "tiny_b")})
    reference.obs["plate"] = [f"{name}{i % 2}" for i, name in enumerate(reference.obs["dataset"])]
    return reference


def test_a_held_out_batch_is_only_tested_on() -> None:
    """All its cells are test cells and no others are; validation cells come from every class of the rest."""
    reference = two_sets()
    config = tiny_config(batch_key="plate", split={"method": "held_out", "held_out": ["tiny_a1", "tiny_b"]})
    split = split_reference(config, reference)
    part = np.array(list(split.part.values()))
    is_left = (reference.obs["plate"] == "tiny_a0").to_numpy()
    assert set(part[~is_left]) == {TEST}
    assert Counter(part[is_left]) == {TRAIN: 54, VALIDATION: 6}
    assert set(reference.obs["cell_type"][part == VALIDATION]) == {"B", "NK", "CD4 T"}


def test_a_held_out_batch_is_unknown_to_the_model() -> None:
    """The model has the batches that it was trained on, and genes are chosen without the others."""
    reference = two_sets()
    config = tiny_config(split={"method": "held_out", "held_out": ["tiny_a"]})
    prepared = prepare(config, reference, split_reference(config, reference))
    assert prepared.batches == ("tiny_b",)
    assert prepared.dimensions.n_batches == 1
    by_plate = tiny_config(batch_key="plate")
    assert prepare(by_plate, reference, split_reference(by_plate, reference)).batches == (
        "tiny_a0", "tiny_a1", "tiny_b0", "tiny_b1",
    )  # fmt: skip


def test_published_test_cells_stay_apart_when_batches_are_held_out() -> None:
    """Whatever batch they are of."""
    reference = two_sets()
    reference.obs.loc[reference.obs_names[:3], "published_split"] = "test"
    split = hold_out(reference, reference.obs["plate"], ("tiny_a0",), ["x"] * reference.n_obs, 0.1, 0)
    assert [name for name, part in split.part.items() if part == PUBLISHED] == list(reference.obs_names[:3])


def test_what_cannot_be_held_out_is_said() -> None:
    """With the batches that there are; and something must be left."""
    reference = two_sets()
    plates, strata = reference.obs["plate"], ["x"] * reference.n_obs
    with pytest.raises(UnknownBatch, match="tiny_a, tiny_a0, tiny_a1"):
        hold_out(reference, plates, ("plate9",), strata, 0.1, 0)
    with pytest.raises(UnknownBatch, match="nothing to train on"):
        hold_out(reference, plates, ("tiny_a", "tiny_b"), strata, 0.1, 0)


def test_each_method_gives_another_split() -> None:
    """The method of a configuration is used."""
    reference = two_sets()
    found = [
        split_reference(tiny_config(split={"method": method}), reference).part
        for method in ("stratified", "random", "sequential")
    ]
    assert found[0] != found[1] != found[2] != found[0]
