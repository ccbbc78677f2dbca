"""Likelihood per cell and standard deviations, against the same worked out at once in numpy."""

import numpy as np
import pytest
import torch

from tests.training.evaluation.conftest import Evaluated
from training.evaluation import cells as evaluated_cells
from training.evaluation.abilities import has_likelihood
from training.evaluation.cells import known_batches, read
from training.evaluation.reconstruction import reconstruction


def test_figures_are_those_of_the_definition(evaluated: Evaluated) -> None:
    """Law of total variance and log-likelihood over all cells at once, in float64 where it matters."""
    made, _, document = evaluated
    found, family = document["models"]["best"]["reconstruction"], made.family.eval()
    if not has_likelihood(family):
        assert found is None
        return
    cells = read(made, made.split.positions(made.reference, "test"))
    counts = torch.from_numpy(cells.counts.toarray())
    with torch.no_grad():
        latent = family.graphs()["encode"].module(counts)
        said = family.distribution(latent, counts.sum(dim=1), torch.from_numpy(cells.batch))
        values = family.observed(counts)
        per_cell = said.log_prob(values).sum(dim=1).double().numpy()
        mean, variance = said.mean.double().numpy(), said.variance.double().expand_as(values).numpy()
    observed, explained = values.double().numpy().var(axis=0), mean.var(axis=0)
    total = explained + variance.mean(axis=0)
    assert found["n_cells"] == len(cells)
    expected = {"mean": per_cell.mean(), "standard_deviation": per_cell.std(), "median": np.median(per_cell)}
    assert {name: found["log_likelihood"][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["log_likelihood"]["minimum"] == pytest.approx(per_cell.min(), rel=1e-5)
    deviations = {"total": total, "explained": explained, "observed": observed}
    assert found["standard_deviation"] == pytest.approx(
        {name: np.sqrt(variance).mean() for name, variance in deviations.items()}, rel=1e-4
    )
    assert found["explained_share"] == pytest.approx(explained.sum() / total.sum(), rel=1e-4)


def test_minibatches_change_nothing(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over parts are those over the whole."""
    made = evaluated[0]
    if not has_likelihood(made.family):
        assert made.config.family == "cite_autoencoder"
        return
    cells = read(made, made.split.positions(made.reference, "test"))
    whole = reconstruction(made.family.eval(), cells, 2)
    monkeypatch.setattr(evaluated_cells.minibatches, "__defaults__", (7,))
    parts = reconstruction(made.family, cells, 2)
    for name, figures in whole.items():
        assert parts[name] == pytest.approx(figures, rel=1e-4), name


def test_cells_of_an_unknown_batch_are_averaged_over_the_known_ones(evaluated: Evaluated) -> None:
    """Or get the family's own code of the average batch; the others keep theirs."""
    family = evaluated[0].family
    found = known_batches(family, np.array([0, -1, 1]), 2)
    if family.average_batch is None:
        assert [one.tolist() for one in found] == [[0, 0, 1], [0, 1, 1]]
    else:
        assert [one.tolist() for one in found] == [[0, family.average_batch, 1]]
