"""What gmvae does that other families do not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch.distributions import MultivariateNormal, Normal

from tests.training.families.test_families import build, example, outputs
from tests.training.tiny import tiny_config
from training import run
from training.families.gmvae import GMVAE, _divergence


def test_components_differ_while_training_with_batch_norm() -> None:
    """As scVAE has it they cancel: each component there is normalised by its own minibatch, which subtracts what tells it from the others."""
    family = build("gmvae", batch_norm=True, dropout=0.0, input_dropout=0.0, hidden=(12,)).train()
    values = family.transform(example().counts)
    together = family.to_mean(family._components(values)).view(6, family.n_clusters, -1)
    assert float((together[:, 0] - together[:, 1]).detach().abs().max()) > 1e-2
    first = family.component[0]
    alone = []
    for k in range(2):
        code = torch.nn.functional.one_hot(torch.full((6,), k), family.n_clusters).float()
        alone.append(family.to_mean(family.component[1:](first(torch.cat([values, code], dim=1)))))
    torch.testing.assert_close(alone[0], alone[1], atol=1e-5, rtol=0)


def test_the_first_layer_is_that_of_cell_and_component() -> None:
    """Splitting it into what depends on the cell and what on the component changes nothing."""
    family = build("gmvae", dropout=0.0, input_dropout=0.0).eval()
    values = family.transform(example().counts)
    rows = family._components(values).view(6, family.n_clusters, -1)
    for k in range(family.n_clusters):
        code = torch.nn.functional.one_hot(torch.full((6,), k), family.n_clusters).float()
        torch.testing.assert_close(rows[:, k], family.component(torch.cat([values, code], dim=1)))


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_divergence_is_the_mean_of_log_ratios(covariance: str) -> None:
    """Against 200,000 draws."""
    torch.manual_seed(0)
    mean, prior_mean = torch.randn(1, 2, 3), torch.randn(2, 3)
    scale, prior_scale = torch.rand(1, 2, 3) + 0.3, torch.rand(2, 3) + 0.5
    if covariance == "full":
        below = torch.tril(torch.randn(3, 3) * 0.3, -1)
        scale, prior_scale = torch.diag_embed(scale) + below, torch.diag_embed(prior_scale) - below
        posterior = MultivariateNormal(mean, scale_tril=scale)
        prior = MultivariateNormal(prior_mean, scale_tril=prior_scale)
        drawn = posterior.sample((200_000,))
        ratio = posterior.log_prob(drawn) - prior.log_prob(drawn)
    else:
        drawn = Normal(mean, scale).sample((200_000,))
        ratio = (Normal(mean, scale).log_prob(drawn) - Normal(prior_mean, prior_scale).log_prob(drawn)).sum(dim=-1)
    torch.testing.assert_close(
        _divergence(mean, scale, prior_mean, prior_scale), ratio.mean(dim=0), rtol=0.02, atol=0.02
    )


def test_the_latent_is_the_mean_over_components() -> None:
    """sum_k q(k|x) mean_k, as scVAE exports it; the graph gives the mixture beside the labels."""
    family = build("gmvae").eval()
    found = outputs(family, example())
    with torch.no_grad():
        means = family.to_mean(family._components(family.transform(example().counts))).view(6, 3, -1)
    torch.testing.assert_close(found["latent"], (found["probabilities_cluster"][:, :, None] * means).sum(dim=1))
    torch.testing.assert_close(found["probabilities_cluster"].sum(dim=1), torch.ones(6))


def test_clusters_are_named_by_known_labels_only() -> None:
    """P(class | cluster) is the share of the training cells' weight; cells without a label do not count."""
    family = build("gmvae", n_clusters=2).eval()
    cells = example()
    family.conclude([cells])
    q = family.clusters(cells.counts).detach()[:5]
    labels = torch.nn.functional.one_hot(cells.labels[:5, 0], 3).float()
    total = q.T @ labels + labels.mean(dim=0)
    torch.testing.assert_close(family.namings()[0], total / total.sum(dim=1, keepdim=True))
    unlabelled = build("gmvae", n_clusters=2).eval()
    unlabelled.conclude([dataclasses.replace(cells, labels=torch.full((6, 1), -1))])
    torch.testing.assert_close(unlabelled.namings()[0], torch.full((2, 3), 1 / 3))


def test_free_nats_are_free_while_training_only() -> None:
    """With all of the prior's entropy free the components' divergence has no gradient; validation counts it whole."""
    cells = dataclasses.replace(example(), epoch=100)
    for free_nats, is_free in ((1.0, True), (0.0, False)):
        family = build("gmvae", free_nats=free_nats, kl_warmup_epochs=0, dropout=0.0, input_dropout=0.0)
        torch.manual_seed(0)
        losses = family.loss(cells)
        counted = losses["loss"] - losses["reconstruction"] - losses["divergence"]
        found = float(losses["cluster_divergence"].detach())
        assert found < np.log(3)
        assert float(counted.detach()) == pytest.approx(np.log(3) if is_free else found, rel=1e-3)
        family.eval()
        losses = family.loss(cells)
        counted = losses["loss"] - losses["reconstruction"] - losses["divergence"]
        assert float(counted.detach()) == pytest.approx(float(losses["cluster_divergence"].detach()), abs=1e-3)


def test_priors() -> None:
    """Equal, the classes' shares, given, or trained; the ones that do not fit are refused."""
    share = {name: torch.softmax(build("gmvae", prior=name).prior_logits, dim=0) for name in ("uniform", "inferred")}
    torch.testing.assert_close(share["uniform"], torch.full((3,), 1 / 3))
    torch.testing.assert_close(share["inferred"], torch.tensor([51.0, 11.0, 6.0]) / 68.0)
    learned = build("gmvae", prior="learned", free_nats=0.0)
    learned.loss(example())["loss"].backward()
    assert learned.prior_logits.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        build("gmvae", prior="custom", prior_probabilities=(0.5, 0.4), n_clusters=2)
    with pytest.raises(ValueError, match="go with prior: custom"):
        build("gmvae", prior="custom")
    with pytest.raises(ValueError, match="3 probabilities and the mixture 5"):
        build("gmvae", prior="inferred", n_clusters=5)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_samples_are_of_the_prior(covariance: str) -> None:
    """Their mean is that of the mixture."""
    family = build("gmvae", covariance=covariance, prior="custom", prior_probabilities=(0.2, 0.3, 0.5))
    drawn = family.sample_latent(100_000, torch.Generator().manual_seed(0))
    expected = torch.tensor([0.2, 0.3, 0.5]) @ family.prior_mean
    torch.testing.assert_close(drawn.mean(dim=0), expected, atol=0.03, rtol=0)


def test_planted_types_are_found_without_labels(tiny_sets: None, tmp_path: Path) -> None:
    """Three types that differ in a third of the genes each: the mixture has seen no label."""
    config = tiny_config(
        family="gmvae",
        model={"hidden": [32], "n_latent": 4, "kl_warmup_epochs": 30, "n_clusters": 3},
        fit={"max_epochs": 60, "patience": 60, "rows": 32, "device": "cpu", "learning_rate": 0.01},
    )
    made = run.fit(config, tmp_path / "run", show_progress=False)
    assert isinstance(made.family, GMVAE)
    cells = made.prepared.train
    found = made.family.clusters(torch.from_numpy(cells.counts.toarray())).argmax(dim=1).numpy()
    assert adjusted_rand_score(cells.labels[:, 0], found) > 0.8
