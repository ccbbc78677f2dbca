"""Held-out molecules: the thinning, the score, and the trivial model beside it."""

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.evaluation.conftest import Evaluated
from training.data.minibatches import Cells
from training.evaluation.cells import PARTS, read
from training.evaluation.molecules import FLOOR, SHARE, held_out_molecules, poisson, thin
from training.families.family import Graph


@given(seed=st.integers(0, 1000), largest=st.sampled_from([1, 5, 10_000]))
def test_both_parts_add_up_to_the_counts(seed: int, largest: int) -> None:
    """Each is of whole molecules, none negative; the same seed gives the same parts."""
    generator = np.random.default_rng(seed)
    counts = sp.csr_matrix(generator.integers(0, largest + 1, (6, 5)).astype(np.float32))
    first, second = thin(counts, SHARE, np.random.default_rng(seed))
    np.testing.assert_array_equal((first + second).toarray(), counts.toarray())
    for part in (first, second):
        assert (part.toarray() >= 0).all()
        np.testing.assert_array_equal(part.toarray(), np.round(part.toarray()))
    np.testing.assert_array_equal(thin(counts, SHARE, np.random.default_rng(seed))[0].toarray(), first.toarray())


def test_the_thinning_is_binomial() -> None:
    """Mean and variance of 40,000 thinned counts of 8, within five standard errors."""
    counts = sp.csr_matrix(np.full((200, 200), 8, dtype=np.float32))
    seen = thin(counts, 0.25, np.random.default_rng(0))[0].toarray()
    assert seen.mean() == pytest.approx(2.0, abs=5 * np.sqrt(1.5 / seen.size))
    assert seen.var() == pytest.approx(1.5, abs=5 * 1.5 * np.sqrt(2 / seen.size) * 1.2)


def test_poisson_is_scipys() -> None:
    """Also where count and mean are 0."""
    counts, mean = np.array([0.0, 0.0, 3.0, 1000.0]), np.array([0.0, 2.5, 2.5, 900.0])
    found = poisson(torch.from_numpy(counts), torch.from_numpy(mean)).numpy()
    np.testing.assert_allclose(found, scipy.stats.poisson.logpmf(counts, mean), rtol=1e-12)


def test_the_score_is_that_of_the_formula(evaluated: Evaluated) -> None:
    """Cell by cell through the served graphs and scipy, for every family."""
    made, _, document = evaluated
    found = document["models"]["best"]["held_out_molecules"]
    cells = read(made, made.split.positions(made.reference, "test"))
    seen, unseen = thin(cells.counts, SHARE, np.random.default_rng(made.config.seed))
    share = made.prepared.train.counts.sum(axis=0).A1.astype(float)
    share /= share.sum()
    graphs = made.family.eval().graphs()
    model = trivial = 0.0
    for i in range(len(cells)):
        truth = unseen[i].toarray()[0]
        size = float(truth.sum())
        with torch.no_grad():
            latent = graphs["encode"].module(torch.from_numpy(seen[i].toarray()))
            expected = graphs["decode"].module(latent, torch.tensor([size]), torch.from_numpy(cells.batch[[i]]))
        mean = (expected[0] if isinstance(expected, tuple) else expected)[0].double().numpy()
        model += scipy.stats.poisson.logpmf(truth, np.maximum(mean, FLOOR * size)).sum()
        trivial += scipy.stats.poisson.logpmf(truth, np.maximum(share * size, FLOOR * size)).sum()
    n_molecules = unseen.sum()
    assert (found["n_cells"], found["n_molecules"]) == (len(cells), int(n_molecules))
    assert found["model"] == pytest.approx(model / n_molecules, rel=1e-4)
    assert found["trivial"] == pytest.approx(trivial / n_molecules, rel=1e-4)
    assert found["gain"] == pytest.approx(found["model"] - found["trivial"])


class KnowsTheMeans(torch.nn.Module):
    """A family whose latent is the counts' own type (which of two halves of the genes is on), and that expects its true means."""

    average_batch = None

    def __init__(self, means: torch.Tensor) -> None:
        super().__init__()
        self.means = means

    def graphs(self) -> dict:
        means = self.means

        class Encode(torch.nn.Module):
            def forward(self, counts: torch.Tensor) -> torch.Tensor:
                half = counts.shape[1] // 2
                return (counts[:, half:].sum(1) > counts[:, :half].sum(1)).long()[:, None]

        class Decode(torch.nn.Module):
            def forward(self, latent: torch.Tensor, library: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
                return means[latent[:, 0]] * library[:, None]

        return {"encode": Graph(Encode(), (), ()), "decode": Graph(Decode(), (), ())}


def test_who_tells_cells_apart_gains() -> None:
    """Two types: their true means beat the mean of all cells, and means of the wrong type are worse than it."""
    generator = np.random.default_rng(0)
    means = np.array([[0.2] * 5 + [0.0] * 5, [0.0] * 5 + [0.2] * 5])
    counts = sp.csr_matrix(generator.poisson(50 * means[np.arange(40) % 2]).astype(np.float32))
    cells = Cells(counts, np.zeros(40, dtype=np.int64), np.zeros((40, 0), dtype=np.int64))
    right = held_out_molecules(KnowsTheMeans(torch.from_numpy(means).float()), cells, counts, 1, 0)
    wrong = held_out_molecules(KnowsTheMeans(torch.from_numpy(means[::-1].copy()).float()), cells, counts, 1, 0)
    # Knowing the half halves the genes that a molecule may come from.
    assert right["gain"] == pytest.approx(np.log(2), abs=0.01)
    assert wrong["gain"] < 0
    assert (right["at_floor"], wrong["at_floor"]) == (0.0, 1.0)


def test_parts_do_not_overlap(evaluated: Evaluated) -> None:
    """A held-out cell was not trained on."""
    made = evaluated[0]
    found = [set(made.split.positions(made.reference, part)) for part in PARTS]
    assert sum(map(len, found)) == len(set.union(*found)) == made.reference.n_obs
