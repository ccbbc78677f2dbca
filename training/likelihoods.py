"""Negative log-likelihoods and divergences, in nats. Shapes are (n_cells, n_genes) or (n_cells, n_latent)."""

import torch
from torch import Tensor


def negative_binomial(counts: Tensor, mean: Tensor, log_theta: Tensor) -> Tensor:
    """Negative log-likelihood under a negative binomial of variance mean + mean² / theta (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2).

    Args:
        counts: raw counts.
        mean: of the same shape, positive.
        log_theta: log of the inverse dispersion, shape (n_genes,) or that of `counts`.

    Returns:
        Per count, of the shape of `counts`.
    """
    epsilon = 1e-8
    theta = log_theta.exp() + 1e-4  # lgamma has a pole at 0
    log_total = torch.log(theta + mean + epsilon)
    log_likelihood = (
        theta * (torch.log(theta + epsilon) - log_total)
        + counts * (torch.log(mean + epsilon) - log_total)
        + torch.lgamma(counts + theta)
        - torch.lgamma(theta)
        - torch.lgamma(counts + 1)
    )
    return -log_likelihood


def squared_error(values: Tensor, mean: Tensor) -> Tensor:
    """Squared error: twice the negative log-likelihood of a Gaussian of unit variance, without its constant."""
    return (values - mean).square()


def normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, exp(log_variance)) from N(0, 1), per latent unit (Kingma & Welling 2014, arXiv:1312.6114, B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
