"""Likelihoods against scipy and torch.distributions, in float64."""

from typing import Any, get_args

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence

from training import likelihoods
from training.likelihoods import LIKELIHOODS, LikelihoodName, NegativeBinomial, Piecewise, ZeroInflated

torch_double = torch.float64
COUNTS = (0.0, 1.0, 5.0, 1000.0, 1e6)
N_COMPONENTS, K_MAX = 3, 4


def heads_of(name: str, n: int, n_genes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Seeded parameters of every head, (n, n_genes) or as the head's width asks."""
    shapes = {
        "gene": (n, n_genes),
        "components": (n, n_genes, N_COMPONENTS),
        "k_max": (n, n_genes, K_MAX + 1),
        "triangle": (n_genes * (n_genes + 1) // 2,),
    }
    return {
        head.name: torch.randn(shapes[head.width], generator=generator, dtype=torch_double)
        for head in LIKELIHOODS[name].heads
    }


def made(name: str, location: Tensor, seed: int = 0) -> tuple[Distribution, dict[str, Tensor]]:
    """A distribution around `location` (n, n_genes), and its heads."""
    heads = heads_of(name, *location.shape, torch.Generator().manual_seed(seed))
    return LIKELIHOODS[name].build(location, heads), heads


def softplus(values: Any) -> Any:
    return np.logaddexp(0.0, np.asarray(values))


def scipys(name: str, location: np.ndarray, heads: dict[str, np.ndarray]) -> Any:
    """The frozen distribution of scipy with the same parameters, and what is added to values first."""
    theta = np.exp(heads.get("log_theta", 0.0)) + 1e-4
    deviation = heads.get("deviation", np.zeros(1))
    concentration = softplus(heads.get("concentration", np.zeros(1)))
    stats = scipy.stats
    return {
        "poisson": lambda: (stats.poisson(location), 0),
        "constrained_poisson": lambda: (stats.poisson(location), 0),
        "negative_binomial": lambda: (stats.nbinom(theta, theta / (theta + location)), 0),
        "gaussian": lambda: (stats.norm(location, np.exp(heads["log_sigma"].clip(-3, 3))), 0),
        "softplus_gaussian": lambda: (stats.norm(location, np.sqrt(softplus(deviation) + 1e-8)), 0),
        "log_normal": lambda: (stats.lognorm(np.sqrt(softplus(deviation) + 1e-8), scale=1.0 + location), 1),
        "exponentially_modified_gaussian": lambda: (
            stats.exponnorm(
                1.0 / ((softplus(heads["rate"]) + 1e-2) * (softplus(deviation) + 1e-2)),
                loc=location,
                scale=softplus(deviation) + 1e-2,
            ),
            0,
        ),
        "gamma": lambda: (
            stats.gamma(concentration + 1e-4, scale=(location + 1.0) / (concentration + 1e-4)),
            1,
        ),
        "lomax": lambda: (
            stats.lomax(2.01 + concentration, scale=(location + 1e-4) * (1.01 + concentration)),
            0,
        ),
    }[name]()


@pytest.mark.parametrize("name", [
    "poisson", "constrained_poisson", "negative_binomial", "gaussian", "softplus_gaussian", "log_normal",
    "exponentially_modified_gaussian", "gamma", "lomax",
])  # fmt: skip
def test_density_mean_and_variance_are_scipys(name: str) -> None:
    """From counts of 0 to 10^6, where the mean is near the count and where it is far away."""
    values = torch.tensor([COUNTS] * 3, dtype=torch_double)
    location = values * torch.tensor([[1.0], [0.5], [2.0]], dtype=torch_double) + 0.5
    if LIKELIHOODS[name].explains == "values":
        values, location = torch.log1p(values), torch.log1p(location)
    distribution, heads = made(name, location)
    expected, offset = scipys(name, location.numpy(), {key: head.numpy() for key, head in heads.items()})
    density = expected.logpmf if LIKELIHOODS[name].explains == "counts" else expected.logpdf
    np.testing.assert_allclose(
        distribution.log_prob(values).numpy(), density(values.numpy() + offset), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(distribution.mean.numpy(), expected.mean() - offset, rtol=1e-6)
    np.testing.assert_allclose(distribution.variance.numpy(), expected.var(), rtol=1e-6)


def test_multivariate_gaussian_is_scipys() -> None:
    """The sum over genes is the joint density."""
    location = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch_double)
    distribution, _ = made("multivariate_gaussian", location)
    values = location + 0.7
    scale = distribution.scale_tril.numpy()
    covariance = scale @ scale.T
    for row, mean, found in zip(
        values.numpy(), location.numpy(), distribution.log_prob(values).sum(dim=1), strict=True
    ):
        assert float(found) == pytest.approx(scipy.stats.multivariate_normal(mean, covariance).logpdf(row), rel=1e-9)
    np.testing.assert_allclose(distribution.variance.numpy()[0], np.diag(covariance))


def test_gaussian_mixture_is_a_sum_of_scipys() -> None:
    """Of three components per gene."""
    location = torch.zeros(2, 3, dtype=torch_double)
    distribution, heads = made("gaussian_mixture", location)
    weight = torch.softmax(heads["weights"], dim=-1).numpy()
    parts = scipy.stats.norm(heads["offsets"].numpy(), np.exp(heads["log_sigma"].numpy()))
    values = torch.full_like(location, 0.3)
    expected = np.log((weight * parts.pdf(0.3)).sum(axis=-1))
    np.testing.assert_allclose(distribution.log_prob(values).numpy(), expected, rtol=1e-9)


def test_bernoulli_is_scipys() -> None:
    """Of whether a gene is detected."""
    logits = torch.tensor([[-3.0, 0.0, 4.0]], dtype=torch_double)
    values = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch_double)
    expected = scipy.stats.bernoulli(scipy.special.expit(logits.numpy())).logpmf(values.numpy())
    np.testing.assert_allclose(made("bernoulli", logits)[0].log_prob(values).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("gate", [-60.0, -5.0, 0.0, 5.0, 60.0])
def test_zero_inflation_is_a_mixture_in_log_space(gate: float) -> None:
    """Where probabilities would be 0 or 1 the logarithms still are finite and right."""
    mean = torch.tensor([[0.5, 3.0, 800.0]], dtype=torch_double)
    logits = torch.full_like(mean, gate)
    distribution = ZeroInflated(torch.distributions.Poisson(mean), logits)
    zero = distribution.log_prob(torch.zeros_like(mean)).numpy()
    log_gate, log_rest = -np.logaddexp(0.0, -gate), -np.logaddexp(0.0, gate)
    np.testing.assert_allclose(zero, np.logaddexp(log_gate, log_rest - mean.numpy()), rtol=1e-9, atol=1e-12)
    seven = distribution.log_prob(torch.full_like(mean, 7.0)).numpy()
    np.testing.assert_allclose(seven, log_rest + scipy.stats.poisson(mean.numpy()).logpmf(7), rtol=1e-9)
    assert np.isfinite(zero).all()
    assert np.isfinite(seven).all()


def test_piecewise_pieces() -> None:
    """Below k_max the categories, at it and above the moved distribution; mean as scVAE has it."""
    logits = torch.randn(1, 2, K_MAX + 1, generator=torch.Generator().manual_seed(0), dtype=torch_double)
    mean = torch.tensor([[2.0, 9.0]], dtype=torch_double)
    distribution = Piecewise(torch.distributions.Poisson(mean), logits)
    pi = torch.softmax(logits, dim=-1)
    for count in range(K_MAX):
        found = distribution.log_prob(torch.full_like(mean, count)).exp()
        torch.testing.assert_close(found, pi[..., count])
    found = distribution.log_prob(torch.full_like(mean, K_MAX + 3)).exp()
    torch.testing.assert_close(found, pi[..., -1] * torch.from_numpy(scipy.stats.poisson(mean.numpy()).pmf(3)))
    small = sum(k * pi[..., k] for k in range(K_MAX))
    torch.testing.assert_close(distribution.mean, small + pi[..., -1] * (mean + K_MAX))


COUNTING = [
    "poisson", "negative_binomial", "zero_inflated_poisson", "zero_inflated_negative_binomial", "categorical",
]  # fmt: skip


@pytest.mark.parametrize("name", [*COUNTING, "piecewise"])
@given(mean=st.floats(0.01, 30.0), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_mass_sums_to_one(name: str, mean: float, seed: int) -> None:
    """Over all counts, and its moments are the mean and the variance that are claimed."""
    location = torch.full((1, 1), mean, dtype=torch_double)
    if name == "piecewise":
        logits = torch.randn(1, 1, K_MAX + 1, generator=torch.Generator().manual_seed(seed), dtype=torch_double)
        distribution: Distribution = Piecewise(torch.distributions.Poisson(location), logits)
    elif "negative" in name:
        heads = heads_of(name, 1, 1, torch.Generator().manual_seed(seed))
        # A heavy tail needs more counts than fit here.
        distribution = LIKELIHOODS[name].build(location, {**heads, "log_theta": heads["log_theta"].clamp(min=0.0)})
    else:
        distribution, _ = made(name, location, seed)
    n = K_MAX + 1 if name == "categorical" else 4000
    counts = torch.arange(n, dtype=torch_double)[:, None]
    mass = distribution.log_prob(counts).exp()
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-6)
    first = float((mass * counts).sum())
    assert first == pytest.approx(float(distribution.mean), rel=1e-4, abs=1e-6)
    assert float((mass * counts**2).sum()) - first**2 == pytest.approx(float(distribution.variance), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_have_the_mean_and_the_variance(name: str) -> None:
    """Of 40,000 draws of each of three genes, within five standard errors."""
    location = torch.tensor([[0.3, 2.0, 6.0]], dtype=torch_double)
    heads = heads_of(name, 1, 3, torch.Generator().manual_seed(4))
    if "concentration" in heads:
        heads["concentration"] = heads["concentration"] + 8.0  # so that a fourth moment exists
    distribution = LIKELIHOODS[name].build(location, heads)
    torch.manual_seed(0)
    n = 40_000
    drawn = distribution.sample(torch.Size((n,))).squeeze(1)
    mean, variance = distribution.mean.squeeze(0), distribution.variance.squeeze(0)
    error = (variance / n).sqrt()
    assert bool(((drawn.mean(dim=0) - mean).abs() <= 5 * error + 1e-9).all())
    kurtosis = ((drawn - mean) ** 4).mean(dim=0)
    error = ((kurtosis - variance.square()).clamp(min=0) / n).sqrt()
    assert bool(((drawn.var(dim=0) - variance).abs() <= 5 * error + 1e-6).all())


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_from_no_count_to_a_million(name: str, dtype: torch.dtype) -> None:
    """Of the location and of every head, at parameters far out."""
    likelihood = LIKELIHOODS[name]
    values = torch.tensor([COUNTS], dtype=dtype)
    if likelihood.explains == "values":
        values = torch.log1p(values)
    elif likelihood.explains == "detection":
        values = (values > 0).to(dtype)
    for size in (1e-6, 1.0, 1e6):
        for extreme in (-30.0, 0.0, 30.0):
            location = torch.full_like(values, np.log1p(size) if likelihood.explains == "values" else size)
            # Gene after gene, a triangle multiplies what is far out.
            far = extreme / 30.0 if name == "multivariate_gaussian" else extreme
            heads = {
                key: torch.full_like(head, far, dtype=dtype)
                for key, head in heads_of(name, *values.shape, torch.Generator()).items()
            }
            leaves = [location.requires_grad_(), *(head.requires_grad_() for head in heads.values())]
            log_prob = likelihood.build(location, heads).log_prob(values)
            log_prob.sum().backward()
            assert bool(torch.isfinite(log_prob).all())
            assert all(leaf.grad is None or bool(torch.isfinite(leaf.grad).all()) for leaf in leaves)


def test_float32_is_near_float64() -> None:
    """The negative binomial of large counts: relative to the largest of its terms."""
    counts = torch.tensor([COUNTS], dtype=torch_double)
    double = NegativeBinomial(counts + 0.5, torch.zeros_like(counts)).log_prob(counts)
    single = NegativeBinomial(counts.float() + 0.5, torch.zeros_like(counts).float()).log_prob(counts.float())
    terms = torch.lgamma(counts + 1).abs() + 1.0
    assert bool(((double - single.double()).abs() <= 1e-6 * terms).all())


def test_the_table_and_the_names_agree() -> None:
    """What a configuration may say is what there is."""
    assert set(LIKELIHOODS) == set(get_args(LikelihoodName))


def test_squared_error_is_a_gaussians() -> None:
    """Of variance one half, up to the constant."""
    values, mean = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])
    constant = 0.5 * np.log(np.pi)
    gaussian = Normal(mean, np.sqrt(0.5)).log_prob(values) + constant
    torch.testing.assert_close(LIKELIHOODS["mse"].build(mean, {}).log_prob(values), gaussian)
    torch.testing.assert_close(likelihoods.squared_error(values, mean), -gaussian)


def test_divergence_is_torchs() -> None:
    """Of a diagonal Gaussian from the unit Gaussian."""
    mean, log_variance = torch.tensor([[0.3, -1.0]]), torch.tensor([[0.2, -3.0]])
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(0.0, 1.0))
    torch.testing.assert_close(likelihoods.normal_divergence(mean, log_variance), expected)
