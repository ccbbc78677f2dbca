"""What atlas_vae does that other families do not."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.training.families.test_families import N_GENES, build, example
from training.families.family import Example
from training.likelihoods import LIKELIHOODS, NegativeBinomial, ZeroInflated


def loss(cells: Example, **changes: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return build("atlas_vae", **changes).loss(cells)


def test_a_batch_that_is_unknown_is_explained_as_the_average() -> None:
    """-1 and the average's own index give one loss; validation cells may be of a batch that was held out."""
    cells = example()
    unknown = dataclasses.replace(cells, batch=torch.full((6,), -1))
    average = dataclasses.replace(cells, batch=torch.full((6,), 3))
    for changes in ({}, {"batch_code": "one_hot"}, {"dispersion": "gene_batch"}):
        settings = {"mmd_weight": 0.0, **changes}
        assert loss(unknown, **settings)["loss"] == loss(average, **settings)["loss"]
        assert loss(unknown, **settings)["loss"] != loss(cells, **settings)["loss"]


def test_the_encoder_knows_no_batch() -> None:
    """Shuffled batches leave the latent as it is: the graph does not even have the input."""
    assert build("atlas_vae").graphs()["encode"].inputs == ("counts",)


def test_cells_without_a_wanted_embedding_are_free() -> None:
    """The constraint is the mean over cells that have one; with none it is zero."""
    cells = example()
    some = cells.obsm["X_start"].clone()
    some[3:] = torch.nan
    half = {key: value[:3] for key, value in cells.obsm.items()}
    first = Example(cells.counts[:3], cells.target[:3], cells.batch[:3], cells.labels[:3], 0, half)
    for kind in ("mse", "normal"):
        settings = {"constraint": kind, "dropout": 0.0, "input_dropout": 0.0}
        found = loss(dataclasses.replace(cells, obsm={**cells.obsm, "X_start": some}), **settings)["constraint"]
        torch.testing.assert_close(found, loss(first, **settings)["constraint"])
        none = {**cells.obsm, "X_start": torch.full_like(some, torch.nan)}
        assert loss(dataclasses.replace(cells, obsm=none), **settings)["constraint"] == 0


def test_an_embedding_of_another_width_is_refused() -> None:
    """With both widths."""
    family = build("atlas_vae")
    obsm = {**family.dimensions.obsm, "X_start": ("0", "1", "2")}
    dimensions = dataclasses.replace(family.dimensions, obsm=obsm)
    with pytest.raises(ValueError, match="3 wide and n_latent 4"):
        type(family)(family.hyperparameters, dimensions, None)


def test_classes_weigh_the_inverse_of_their_cells() -> None:
    """By default, and in all epochs; a cell without a label teaches nothing."""
    from training.families import FAMILIES

    defaults = FAMILIES["atlas_vae"].defaults()
    assert (defaults.class_weight_power, defaults.classifier_from_epoch) == (1.0, 0)
    family = build("atlas_vae", class_weight_power=1.0)
    weight = family.classifier._class_weight[0]
    np.testing.assert_allclose(weight * torch.tensor([50.0, 10.0, 5.0]), [65 / 3] * 3, rtol=1e-6)


def test_labels_can_be_learned_late() -> None:
    """As published: not before the epoch that is given."""
    cells = example()
    assert "classification" not in loss(cells, classifier_from_epoch=3)
    assert "classification" in loss(dataclasses.replace(cells, epoch=3), classifier_from_epoch=3)


def test_zero_inflated_negative_binomial() -> None:
    """Against scipy in float64; log space holds where the gate is far off on either side."""
    counts = torch.tensor([[0.0, 0.0, 1.0, 7.0, 0.0, 0.0]], dtype=torch.float64)
    mean = torch.tensor([[0.5, 30.0, 2.0, 5.0, 1e4, 1e-3]], dtype=torch.float64)
    gate = torch.tensor([[0.3, -2.0, 1.0, -1.0, -40.0, 40.0]], dtype=torch.float64)
    log_theta = torch.log(torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    found = -ZeroInflated(NegativeBinomial(mean, log_theta), gate).log_prob(counts)
    theta = log_theta.exp().numpy() + 1e-4
    pmf = stats.nbinom.pmf(counts.numpy(), theta, theta / (theta + mean.numpy()))
    share = torch.sigmoid(gate).numpy()
    expected = -np.log(share * (counts.numpy() == 0) + (1 - share) * pmf)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_the_published_negative_binomial_lacked_a_logarithm() -> None:
    """Ours has its mean where it should be: samples from it have the decoder's mean and variance mean + mean^2 / theta."""
    mean, theta = torch.tensor([[3.0]]), torch.tensor([2.0])
    counts = torch.arange(400.0)[:, None]
    mass = torch.exp(NegativeBinomial(mean.expand(400, 1), theta.log()).log_prob(counts)).double()
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)
    average = (mass * counts).sum()
    assert abs(float(average) - 3.0) < 1e-3
    assert abs(float((mass * counts.double().square()).sum() - average**2) - (3.0 + 9.0 / 2.0)) < 1e-2


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("encoder", ["mlp", "tabnet"])
def test_every_likelihood_explains_cells_better_with_time(likelihood: str, encoder: str) -> None:
    """A few steps lower the loss; expected counts are not negative and, where shares are decoded, sum to at most the library."""
    settings: dict[str, Any] = {"k_max": 4} if likelihood == "categorical" else {}
    family = build("atlas_vae", likelihood=likelihood, encoder=encoder, dropout=0.0, input_dropout=0.0, **settings)
    cells = example()
    optimizer = torch.optim.Adam(family.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        optimizer.zero_grad()
        found = family.loss(cells)["loss"]
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    assert losses[-1] < losses[0]
    family.eval()
    with torch.no_grad():
        library = torch.full((6,), 100.0)
        expression = family.decode(family.encode(cells.counts), library, torch.full((6,), 3))
    assert expression.shape == (6, N_GENES)
    assert (expression >= 0).all()
    if likelihood in ("poisson", "constrained_poisson", "negative_binomial", "mse"):
        torch.testing.assert_close(expression.sum(dim=1), library, rtol=1e-4, atol=1e-4)
    elif LIKELIHOODS[likelihood].is_inflated:
        assert (expression.sum(dim=1) <= library * 1.0001).all()


def test_depth_can_be_decoded_or_given() -> None:
    """Without decode_library the expected counts do not depend on the library size."""
    for given in (True, False):
        family = build("atlas_vae", decode_library=given, likelihood="negative_binomial").eval()
        latent, batch = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
        with torch.no_grad():
            expression = family.decode(latent, torch.tensor([10.0, 1000.0]), batch)
        assert torch.allclose(expression[0], expression[1]) is not given
    with pytest.raises(ValueError, match="decode_library"):
        build("atlas_vae", decode_library=False, likelihood="constrained_poisson")
