"""Negative log-likelihoods and divergences, in nats. Shapes are (n_cells, n_genes) or (n_cells, n_latent)."""

from torch import Tensor

from training import sparse_negative_binomial


def negative_binomial(counts: Tensor, mean: Tensor, log_theta: Tensor) -> Tensor:
    """Negative log-likelihood under a negative binomial of variance mean + mean² / theta (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2).

    Args:
        counts: raw counts.
        mean: of the same shape, positive.
        log_theta: log of the inverse dispersion, shape (n_genes,) or that of `counts`.

    Returns:
        Per count, of the shape of `counts`.
    """
    theta = log_theta.exp() + 1e-4  # lgamma has a pole at 0
    return sparse_negative_binomial.negative_log_likelihood(counts, mean, theta)


def squared_error(values: Tensor, mean: Tensor) -> Tensor:
    """Squared error: twice the negative log-likelihood of a Gaussian of unit variance, without its constant."""
    return (values - mean).square()


def normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, exp(log_variance)) from N(0, 1), per latent unit (Kingma & Welling 2014, arXiv:1312.6114, B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
