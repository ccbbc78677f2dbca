"""Folds: each cell is judged once, by a network that never met it, and the folds are alike."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from tests.training.tiny import register, tiny_config
from training import run
from training.calibration import folds
from training.data.prepared import column
from training.data.splits import TEST, TRAIN, VALIDATION

N_FOLDS = 4


@pytest.fixture(scope="module", params=[0.0, 0.2])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[run.Run]:
    """A tiny run without and with validation cells."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        config = tiny_config(split={"validation": request.param}, fit={"max_epochs": 2, "rows": 32, "device": "cpu"})
        yield run.fit(config, tmp_path_factory.mktemp("folds") / "run", show_progress=False)


def test_every_cell_is_judged_once_by_a_network_that_never_met_it(made: run.Run) -> None:
    """Neither to fit weights nor to choose the epoch nor for statistics; test cells are in no fold, genes and settings are the run's."""
    given = folds.divide(made, N_FOLDS)
    names, judged = made.reference.obs_names, []
    for network, places in given.networks():
        mine = set(names[given.positions[places]])
        met = set(network.prepared.train.names) | set(network.prepared.validation.names)
        assert not mine & met
        assert mine | met == set(names[given.positions])
        assert {network.split.part[name] for name in network.prepared.validation.names} <= {VALIDATION}
        assert network.prepared.var.equals(made.prepared.var)
        assert (
            network.config.fit.max_epochs == 3
        )  # the run's two, and a third of them more for a quarter of the cells less
        assert network.config.model_copy(update={"seed": made.config.seed, "fit": made.config.fit}) == made.config
        assert network.config.seed != made.config.seed
        judged += places.tolist()
    assert sorted(judged) == list(range(len(given.positions)))
    assert set(given.positions) == set(made.split.positions(made.reference, TRAIN, VALIDATION))
    assert not np.isin(made.split.positions(made.reference, TEST), given.positions).any()
    assert given.cells == ("train and validation" if made.config.split.validation else "train")


def test_folds_are_stratified(made: run.Run) -> None:
    """Cells of each class, of each class in a batch, and of those in each part of the split are spread evenly, but for one."""
    given = folds.divide(made, N_FOLDS)
    cells = made.reference[given.positions]
    kind, batch = cells.obs["cell_type"].astype(str), column(cells, made.config.batch_key)
    part = [made.split.part[name] for name in cells.obs_names]
    for strata in (zip(kind, strict=True), zip(kind, batch, strict=True), zip(kind, batch, part, strict=True)):
        found = Counter(zip(strata, given.fold, strict=True))
        for stratum in {stratum for stratum, _ in found}:
            numbers = [found[stratum, fold] for fold in range(N_FOLDS)]
            assert max(numbers) - min(numbers) <= 1, (stratum, numbers)


def test_small_classes_do_not_meet_in_one_fold(made: run.Run) -> None:
    """Each fold has as many cells as the others, also where no class has a cell for each of them."""
    few = made.split.positions(made.reference, TRAIN)[:6]
    config = made.config.model_copy(
        update={"labels": (made.config.labels[0].model_copy(update={"classes": dict.fromkeys(map(str, range(6)))}),)}
    )
    reference = made.reference[few].copy()
    reference.obs["cell_type"] = list(map(str, range(6)))
    rare = dataclasses.replace(made, config=config, reference=reference)
    assert sorted(Counter(folds.divide(rare, 3).fold.tolist()).values()) == [2, 2, 2]


def test_the_seed_of_the_run_decides(made: run.Run) -> None:
    """The same folds, and the same weights of each network; each has its own, and another seed gives other folds."""
    first, again = folds.divide(made, 2), folds.divide(made, 2)
    np.testing.assert_array_equal(first.fold, again.fold)
    weights = [
        [
            b"".join(weight.numpy().tobytes() for weight in network.family.state_dict().values())
            for network, _ in given.networks()
        ]
        for given in (first, again)
    ]
    assert weights[0] == weights[1]
    assert len(set(weights[0])) == 2
    other = dataclasses.replace(made, config=made.config.model_copy(update={"seed": 1}))
    assert (folds.divide(other, 2).fold != first.fold).any()


def test_a_trial_leaves_one_fold_after_the_other_out(made: run.Run) -> None:
    """What it may be trained on lacks the cells that it is asked about; cells that were set apart are never trained on anyway."""
    given = folds.divide(made, 2)
    asked = []
    for number in range(3):
        split, positions = given.trial(number)
        assert not set(made.reference.obs_names[positions]) & set(split.part)
        asked.append(set(positions))
    assert asked[0] == asked[2]
    assert asked[0] | asked[1] == set(given.positions)
    if made.config.split.validation:
        apart = folds.set_apart(made)
        assert apart.trial(1)[0] is made.split
        np.testing.assert_array_equal(apart.trial(1)[1], made.split.positions(made.reference, VALIDATION))
        assert [network for network, _ in apart.networks()] == [made]
