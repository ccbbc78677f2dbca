"""Codes of batches of several levels."""

import pandas as pd
import pytest
import torch
from anndata import AnnData

from tests.training.tiny import tiny_config
from training.batch_levels import BatchLevels
from training.data.prepared import UnknownColumn, batch_levels, batch_names, column
from training.families.family import BatchLevel

STUDY = BatchLevel("study", ("A", "B"), (0, 0, 1))
DONOR = BatchLevel("donor", ("one", "two", "three"), (0, 1, 2))


@pytest.mark.parametrize(("kind", "width"), [("embedding", 8), ("one_hot", 5)])
def test_batches_of_a_study_share_its_part(kind: str, width: int) -> None:
    """Each level has its own part of the vector, the same for all batches of one value."""
    codes = BatchLevels((STUDY, DONOR), kind, 4)
    found = codes(torch.arange(3))
    n_study = 4 if kind == "embedding" else 2
    assert found.shape == (3, width) == (3, codes.width)
    assert torch.equal(found[0, :n_study], found[1, :n_study])
    assert not torch.equal(found[0, n_study:], found[1, n_study:])
    assert not torch.equal(found[0, :n_study], found[2, :n_study])


@pytest.mark.parametrize("kind", ["embedding", "one_hot"])
def test_the_average_is_that_of_each_level(kind: str) -> None:
    """Index n_batches: in each level the mean over its values, not over batches; an unknown batch is that."""
    codes = BatchLevels((STUDY, DONOR), kind, 4)
    assert codes.known_or_average(torch.tensor([-1, 1])).tolist() == [3, 1]
    average, batches = codes(torch.tensor([3]))[0], codes(torch.arange(3))
    n_study = 4 if kind == "embedding" else 2
    torch.testing.assert_close(average[:n_study], batches[[0, 2], :n_study].mean(dim=0))
    torch.testing.assert_close(average[n_study:], batches[:, n_study:].mean(dim=0))


def cells() -> AnnData:
    obs = pd.DataFrame(
        {"dataset": "tiny_a", "study": ["A", "A", "B"], "donor": ["two", "one", "one"]}, index=["x", "y", "z"]
    )
    return AnnData(obs=obs)


def test_batches_are_the_combinations_that_occur() -> None:
    """Two columns make one name, and each batch knows its value in both."""
    config = tiny_config(batch_key=["study", "donor"])
    assert column(cells(), config.batch_key).tolist() == ["A | two", "A | one", "B | one"]
    names = batch_names(config, cells())
    assert names == ("A | one", "A | two", "B | one")
    study, donor = batch_levels(config, names)
    assert study == BatchLevel("study", ("A", "B"), (0, 0, 1))
    assert donor == BatchLevel("donor", ("one", "two"), (0, 1, 0))


def test_a_column_that_is_not_there() -> None:
    """It is named, with those that there are."""
    with pytest.raises(UnknownColumn, match=r"'plate'.*study, donor"):
        column(cells(), ("study", "plate"))
