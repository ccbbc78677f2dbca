"""Likelihoods against scipy and torch.distributions."""

import numpy as np
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

from training import likelihoods


def test_negative_binomial_is_scipys() -> None:
    """Within 1e-4 relative, which is what the guards against 0 cost in float32."""
    counts = torch.tensor([[0.0, 1.0, 5.0, 100.0]])
    mean, theta = torch.tensor([[0.1, 2.0, 5.0, 80.0]]), torch.tensor([0.5, 1.0, 10.0, 3.0])
    n, p = theta.numpy(), (theta / (theta + mean)).numpy()
    expected = -scipy.stats.nbinom.logpmf(counts.numpy(), n, p)
    found = likelihoods.negative_binomial(counts, mean, theta.log()).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_squared_error_is_twice_the_gaussians() -> None:
    """Up to the constant of a unit Gaussian."""
    values, mean = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])
    gaussian = -Normal(mean, 1.0).log_prob(values)
    constant = 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(likelihoods.squared_error(values, mean), 2 * (gaussian - constant))


def test_divergence_is_torchs() -> None:
    """Of a diagonal Gaussian from the unit Gaussian."""
    mean, log_variance = torch.tensor([[0.3, -1.0]]), torch.tensor([[0.2, -3.0]])
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(0.0, 1.0))
    torch.testing.assert_close(likelihoods.normal_divergence(mean, log_variance), expected)
