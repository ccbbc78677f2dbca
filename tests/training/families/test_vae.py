"""What vae and autoencoder do beside what all families do."""

import dataclasses

import pytest
import torch

from tests.training.families.test_families import N_GENES, build, example


def mean_loss(n: int = 200, **changes: object) -> float:
    """Over n draws, in evaluation mode, with the whole weight of the divergence."""
    family = build("vae", kl_warmup_epochs=0, classifier_weight=0.0, **changes).eval()
    cells = dataclasses.replace(example(), epoch=100)
    torch.manual_seed(0)
    with torch.no_grad():
        return sum(float(family.loss(cells)["loss"]) for _ in range(n)) / n


def test_importance_draws_tighten_the_bound() -> None:
    """The negative bound falls with their number (Burda et al. 2016, theorem 1); Monte Carlo draws leave its mean as it is."""
    one, five, fifty = mean_loss(), mean_loss(n_importance=5), mean_loss(n_importance=50)
    assert one > five > fifty
    assert mean_loss(n=100, n_monte_carlo=20) == pytest.approx(one, rel=2e-2)


def test_unit_variance_has_no_head() -> None:
    """The divergence is that of the mean alone."""
    family = build("vae", posterior="unit_variance").eval()
    assert not hasattr(family, "to_log_variance")
    cells = example()
    with torch.no_grad():
        expected = 0.5 * family.encode(cells.counts).square().sum(dim=1).mean()
        torch.testing.assert_close(family.loss(cells)["divergence"], expected)


def test_a_linear_decoder_has_a_loading_per_unit_and_gene() -> None:
    """Logits of the shares are linear in the latent."""
    family = build("vae", linear_decoder=True).eval()
    assert len(family.decoder) == 0
    assert family.to_share.weight.shape == (N_GENES, 4 + 3)


def test_count_sum_is_the_library_over_the_largest() -> None:
    """With free depth, the decoder sees how deep a cell is."""
    family = build("vae", count_sum=True, decode_library=False, likelihood="poisson").eval()
    latent, batch = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    shallow, deep = family.decode(latent, torch.tensor([1.0, 5.0]), batch)
    assert not torch.allclose(shallow, deep)
    features = family._decoded(torch.zeros(1, 7), torch.tensor([3.0]))
    same = family.decoder(torch.cat([torch.zeros(1, 7), torch.tensor([[3.0 / family.largest_library]])], dim=1))
    torch.testing.assert_close(features, same)


def test_orthogonality_has_a_gradient_unless_as_published() -> None:
    """The published code takes weight.data: the loss is larger and nothing is orthogonalised."""
    cells = example()

    def trained(**changes: object) -> float:
        family = build("autoencoder", input_dropout=0.0, dropout=0.0, **changes)
        optimizer = torch.optim.SGD(family.parameters(), lr=0.01)
        for _ in range(200):
            optimizer.zero_grad()
            family.loss(cells)["loss"].backward()
            optimizer.step()
        return float(family.loss(cells)["orthogonality"].detach())

    without, constrained, published = (
        trained(),
        trained(orthogonality=1.0),
        trained(orthogonality=1.0, orthogonality_published=True),
    )
    assert constrained < 0.2 * without
    assert published == without


def test_the_expression_saliency_shape() -> None:
    """Softplus whose beta is the layer's width, on raw counts, Poisson likelihood of free means."""
    family = build(
        "autoencoder", hidden=(12,), activation="softplus", latent_activation="softplus", likelihood="poisson", input="counts",
        scale=False, clip=None, decode_library=False, mean_activation="softplus",
    )  # fmt: skip
    betas = [module.beta for module in family.modules() if isinstance(module, torch.nn.Softplus)]
    assert betas == [12, 4, 12]
    assert (family.encode(example().counts) >= 0).all()


def test_input_noise_is_drawn_while_training_only() -> None:
    """The target stays clean."""
    family = build("autoencoder", input_noise=2.0, input_dropout=0.0, dropout=0.0)
    cells = example()
    first, second = family.train().loss(cells)["loss"], family.loss(cells)["loss"]
    assert first != second
    first, second = family.eval().loss(cells)["loss"], family.loss(cells)["loss"]
    assert first == second
