"""What a decoder says of counts: distributions by name with the heads that they need; nats, shapes (n_cells, n_genes).

Sources: scVAE's registered distributions (Grønbech et al. 2020, doi:10.1093/bioinformatics/btaa293), scVI (Lopez et al. 2018,
doi:10.1038/s41592-018-0229-2) and scAtlasVAE (Xue et al. 2025, doi:10.1038/s41592-024-02530-0). docs/likelihoods.md has the equations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Gamma,
    LogNormal,
    MixtureSameFamily,
    Normal,
    Poisson,
)
from torch.nn.functional import softplus

from training import sparse_negative_binomial

_ONE = torch.Size()
_EPSILON = 1e-8
_MAX_LOG = 10.0
"""Bound of logarithms of rates and dispersions, as in scVAE."""

_MAX_LOG_SIGMA = 3.0
_MIN_SCALE = 1e-4
MAX_MULTIVARIATE_GENES = 500
"""A full covariance of more genes does not fit: it has n_genes² / 2 entries."""


class NegativeBinomial(Distribution):
    """Variance mean + mean² / theta, theta = exp(log_theta) + 1e-4 (scVI, equation of its supplement)."""

    arg_constraints = {}  # noqa: RUF012 - as torch's own have it

    def __init__(self, mean: Tensor, log_theta: Tensor) -> None:
        """Prepare.

        Args:
            mean: positive, (n, n_genes).
            log_theta: log of the inverse dispersion, (n_genes,) or (n, n_genes).
        """
        self._mean, self.log_theta = mean, log_theta
        super().__init__(mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes)."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """(n, n_genes)."""
        return self._mean + self._mean.square() / self._theta

    @property
    def _theta(self) -> Tensor:
        return self.log_theta.clamp(-_MAX_LOG, _MAX_LOG).exp() + 1e-4  # lgamma has a pole at 0

    def log_prob(self, value: Tensor) -> Tensor:
        """Of raw counts."""
        return sparse_negative_binomial.log_likelihood(value, self._mean, self._theta)

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """A Poisson count whose rate is drawn from a gamma distribution."""
        with torch.no_grad():
            theta = self._theta.expand_as(self._mean)
            rate = torch.distributions.Gamma(theta, theta / (self._mean + _EPSILON), validate_args=False).sample(
                sample_shape
            )
            return torch.poisson(rate)


class ZeroInflated(Distribution):
    """With probability sigmoid(gate) zero, else as `base`; all in log space."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, base: Distribution, gate_logits: Tensor) -> None:
        """Prepare.

        Args:
            base: of (n, n_genes).
            gate_logits: (n, n_genes) or (n, 1).
        """
        self.base, self.gate_logits = base, gate_logits
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes)."""
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """By the law of total variance."""
        mean = self.base.mean
        return torch.sigmoid(-self.gate_logits) * (self.base.variance + torch.sigmoid(self.gate_logits) * mean.square())

    def log_prob(self, value: Tensor) -> Tensor:
        """Of values that are zero where the gate may explain them."""
        log_base, inflated = self.base.log_prob(value), softplus(self.gate_logits)
        zero = torch.logaddexp(self.gate_logits.expand_as(log_base), log_base) - inflated
        return torch.where(value == 0, zero, log_base - inflated)

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """Zero or a draw of the base."""
        with torch.no_grad():
            drawn = self.base.sample(sample_shape)
            return drawn * (torch.rand_like(drawn) >= torch.sigmoid(self.gate_logits))


class Piecewise(Distribution):
    """Categorical below `k_max`, and from there on `k_max` plus a draw of `base` (scVAE's option -k)."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, base: Distribution, logits: Tensor) -> None:
        """Prepare.

        Args:
            base: of (n, n_genes), of the counts above k_max.
            logits: of 0, 1, … k_max - 1, and of `k_max or more`: (n, n_genes, k_max + 1).
        """
        self.base, self.logits = base, torch.log_softmax(logits, dim=-1)
        self.k_max = logits.shape[-1] - 1
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes)."""
        return self._moment(1, self.base.mean + self.k_max)

    @property
    def variance(self) -> Tensor:
        """(n, n_genes)."""
        above = self.base.variance + (self.base.mean + self.k_max).square()
        return self._moment(2, above) - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Of raw counts."""
        piece = _pick(self.logits, value.clamp(0, self.k_max))
        rest = self.base.log_prob((value - self.k_max).clamp(min=0.0))
        return piece + torch.where(value >= self.k_max, rest, torch.zeros_like(rest))

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """A small count, or k_max and more."""
        with torch.no_grad():
            piece = Categorical(logits=self.logits, validate_args=False).sample(sample_shape)
            return torch.where(piece < self.k_max, piece.to(self.logits), self.base.sample(sample_shape) + self.k_max)

    def _moment(self, power: int, above: Tensor) -> Tensor:
        probabilities = self.logits.exp()
        small = torch.arange(self.k_max).to(probabilities) ** power
        return (probabilities[..., :-1] * small).sum(dim=-1) + probabilities[..., -1] * above


class Shifted(Distribution):
    """`base` moved down by `offset`, so that a distribution of positive values has a density at zero."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, base: Distribution, offset: float) -> None:
        self.base, self.offset = base, offset
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes)."""
        return self.base.mean - self.offset

    @property
    def variance(self) -> Tensor:
        """(n, n_genes)."""
        return self.base.variance

    def log_prob(self, value: Tensor) -> Tensor:
        """Of values above -offset."""
        return self.base.log_prob(value + self.offset)

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """A draw of the base, moved."""
        return self.base.sample(sample_shape) - self.offset


class SquaredError(Normal):
    """A normal of variance one half, whose log-density is -(value - mean)², here without its constant."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__(mean, torch.full_like(mean, math.sqrt(0.5)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the squared error."""
        return -squared_error(value, self.loc)


class ExponentiallyModifiedNormal(Distribution):
    """Sum of a normal and an exponential value (Grushka 1972, doi:10.1021/ac60319a011)."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, location: Tensor, scale: Tensor, rate: Tensor) -> None:
        self.location, self.scale, self.rate = location, scale, rate
        super().__init__(location.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes)."""
        return self.location + 1.0 / self.rate

    @property
    def variance(self) -> Tensor:
        """(n, n_genes)."""
        return (self.scale.square() + 1.0 / self.rate.square()).expand_as(self.location)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of real values."""
        distance = value - self.location
        tail = torch.special.log_ndtr(distance / self.scale - self.rate * self.scale)
        return torch.log(self.rate) + self.rate * (0.5 * self.rate * self.scale.square() - distance) + tail

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """The sum of two draws."""
        with torch.no_grad():
            normal = Normal(self.location, self.scale.expand_as(self.location), validate_args=False).sample(
                sample_shape
            )
            return normal + torch.empty_like(normal).exponential_() / self.rate


class Lomax(Distribution):
    """Pareto distribution moved to start at zero (Lomax 1954, doi:10.1080/01621459.1954.10501239), by its mean and concentration > 2."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, mean: Tensor, concentration: Tensor) -> None:
        self._mean, self.concentration = mean, concentration
        self.scale = mean * (concentration - 1.0)
        super().__init__(mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes)."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """(n, n_genes)."""
        return self._mean.square() * self.concentration / (self.concentration - 2.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of values that are not negative."""
        return (
            torch.log(self.concentration)
            - torch.log(self.scale)
            - (self.concentration + 1.0) * torch.log1p(value / self.scale)
        )

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """By the inverse of the distribution function."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            drawn = torch.empty(shape, dtype=self.scale.dtype, device=self.scale.device).exponential_()
            return self.scale * torch.expm1(drawn / self.concentration)


class MultivariateNormal(Distribution):
    """A normal with covariance over genes; `log_prob` is by the chain rule per gene given those before it, and sums to the joint one."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, location: Tensor, scale_tril: Tensor) -> None:
        """Prepare.

        Args:
            location: (n, n_genes).
            scale_tril: lower triangle with a positive diagonal, (n_genes, n_genes) or (n, n_genes, n_genes).
        """
        self.location, self.scale_tril = location, scale_tril
        super().__init__(location.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes)."""
        return self.location

    @property
    def variance(self) -> Tensor:
        """Diagonal of the covariance, (n, n_genes)."""
        return self.scale_tril.square().sum(dim=-1).expand_as(self.location)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of real values."""
        white = torch.linalg.solve_triangular(self.scale_tril, (value - self.location).unsqueeze(-1), upper=False)
        log_scale = torch.log(torch.diagonal(self.scale_tril, dim1=-2, dim2=-1))
        return -0.5 * white.squeeze(-1).square() - log_scale - 0.5 * math.log(2.0 * math.pi)

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """A draw with the covariance."""
        with torch.no_grad():
            noise = torch.randn(torch.Size(sample_shape) + self.location.shape).to(self.location)
            return self.location + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)


class Counts(Categorical):
    """A categorical distribution over 0, 1, … k_max, the last meaning `k_max or more`."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(n, n_genes), with k_max for `k_max or more`."""
        return (self.probs * self._values).sum(dim=-1)

    @property
    def variance(self) -> Tensor:
        """(n, n_genes)."""
        return (self.probs * self._values.square()).sum(dim=-1) - self.mean.square()

    @property
    def _values(self) -> Tensor:
        return torch.arange(self.logits.shape[-1]).to(self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of raw counts."""
        return _pick(self.logits, value.clamp(0, self.logits.shape[-1] - 1))

    def sample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """Counts, as floating point."""
        return super().sample(sample_shape).to(self.logits)


def _pick(logits: Tensor, category: Tensor) -> Tensor:
    """The logit of each category, of the shape that both broadcast to."""
    shape = torch.broadcast_shapes(logits.shape[:-1], category.shape)
    found = torch.gather(logits.expand(*shape, -1), -1, category.expand(shape).long().unsqueeze(-1))
    return found.squeeze(-1)


Explains = Literal["counts", "values", "detection"]


@dataclass(frozen=True)
class Head:
    """A parameter beside the location."""

    name: str
    width: Literal["gene", "components", "k_max", "triangle"] = "gene"
    """Numbers: one per gene, one per gene and component of a mixture, per gene and count up to k_max, or a triangle over all genes."""

    is_dispersion: bool = False
    """Whether it may be a function of the gene, of gene and batch, or of the cell; others are decoded."""


@dataclass(frozen=True)
class Likelihood:
    """How a distribution is made of a decoder's heads."""

    explains: Explains
    """Raw counts; values, that is ln(1 + counts per target_sum) or with free depth raw counts; or whether a gene is detected."""

    build: Callable[[Tensor, Mapping[str, Tensor]], Distribution]
    """From the location (n, n_genes), positive for `counts`, and the heads by name."""

    heads: tuple[Head, ...] = ()
    has_location: bool = True
    is_positive: bool = False
    """Whether the location of `values` must be positive."""

    is_constrained: bool = False
    """Whether the mean always is a share of the cell's library."""

    @property
    def is_inflated(self) -> bool:
        """Whether it has a gate."""
        return GATE in self.heads


GATE = Head("gate")
LOGITS = Head("logits", "k_max")
_THETA = Head("log_theta", is_dispersion=True)
_SIGMA = Head("log_sigma", is_dispersion=True)


def _sigma(heads: Mapping[str, Tensor]) -> Tensor:
    return heads["log_sigma"].clamp(-_MAX_LOG_SIGMA, _MAX_LOG_SIGMA).exp()


def _deviation(heads: Mapping[str, Tensor]) -> Tensor:
    return softplus(heads["deviation"]) + 1e-2


def _mixture(location: Tensor, heads: Mapping[str, Tensor]) -> Distribution:
    weights = Categorical(logits=heads["weights"], validate_args=False)
    parts = Normal(location.unsqueeze(-1) + heads["offsets"], _sigma(heads), validate_args=False)
    return MixtureSameFamily(weights, parts, validate_args=False)


def _triangular(entries: Tensor, n_genes: int) -> Tensor:
    rows, columns = torch.tril_indices(n_genes, n_genes)
    triangle = entries.new_zeros(*entries.shape[:-1], n_genes, n_genes)
    triangle[..., rows, columns] = entries
    diagonal = torch.diagonal(triangle, dim1=-2, dim2=-1)
    return torch.tril(triangle, -1) + torch.diag_embed(softplus(diagonal) + _MIN_SCALE)


def _gamma(location: Tensor, heads: Mapping[str, Tensor]) -> Distribution:
    concentration = softplus(heads["concentration"]) + _MIN_SCALE
    return Shifted(Gamma(concentration.expand_as(location), concentration / (location + 1.0), validate_args=False), 1.0)


def _log_normal(location: Tensor, heads: Mapping[str, Tensor]) -> Distribution:
    scale = torch.sqrt(softplus(heads["deviation"]) + _EPSILON)
    return Shifted(LogNormal(torch.log1p(location), scale.expand_as(location), validate_args=False), 1.0)


def _softplus_gaussian(location: Tensor, heads: Mapping[str, Tensor]) -> Distribution:
    return Normal(
        location, torch.sqrt(softplus(heads["deviation"]) + _EPSILON).expand_as(location), validate_args=False
    )


LIKELIHOODS: dict[str, Likelihood] = {
    "poisson": Likelihood("counts", lambda mean, _: Poisson(mean, validate_args=False)),
    "constrained_poisson": Likelihood(
        "counts", lambda mean, _: Poisson(mean, validate_args=False), is_constrained=True
    ),
    "negative_binomial": Likelihood(
        "counts", lambda mean, heads: NegativeBinomial(mean, heads["log_theta"]), (_THETA,)
    ),
    "zero_inflated_poisson": Likelihood(
        "counts", lambda mean, heads: ZeroInflated(Poisson(mean, validate_args=False), heads["gate"]), (GATE,)
    ),
    "zero_inflated_negative_binomial": Likelihood(
        "counts",
        lambda mean, heads: ZeroInflated(NegativeBinomial(mean, heads["log_theta"]), heads["gate"]),
        (_THETA, GATE),
    ),
    "bernoulli": Likelihood("detection", lambda logits, _: Bernoulli(logits=logits, validate_args=False)),
    "gaussian": Likelihood(
        "values",
        lambda location, heads: Normal(location, _sigma(heads).expand_as(location), validate_args=False),
        (_SIGMA,),
    ),
    "log_normal": Likelihood("values", _log_normal, (Head("deviation", is_dispersion=True),), is_positive=True),
    "softplus_gaussian": Likelihood("values", _softplus_gaussian, (Head("deviation", is_dispersion=True),)),
    "multivariate_gaussian": Likelihood(
        "values",
        lambda location, heads: MultivariateNormal(location, _triangular(heads["triangle"], location.shape[-1])),
        (Head("triangle", "triangle", is_dispersion=True),),
    ),
    "gaussian_mixture": Likelihood(
        "values",
        _mixture,
        (Head("weights", "components"), Head("offsets", "components"), Head("log_sigma", "components")),
    ),
    "exponentially_modified_gaussian": Likelihood(
        "values",
        lambda location, heads: ExponentiallyModifiedNormal(
            location, softplus(heads["deviation"]) + 1e-2, softplus(heads["rate"]) + 1e-2
        ),
        (Head("deviation", is_dispersion=True), Head("rate", is_dispersion=True)),
    ),
    "gamma": Likelihood("values", _gamma, (Head("concentration", is_dispersion=True),), is_positive=True),
    "lomax": Likelihood(
        "values",
        lambda location, heads: Lomax(location + _MIN_SCALE, 2.0 + softplus(heads["concentration"]) + 1e-2),
        (Head("concentration", is_dispersion=True),),
        is_positive=True,
    ),
    "categorical": Likelihood("counts", lambda _, heads: Counts(heads["logits"]), (LOGITS,), has_location=False),
    "zero_inflated_gaussian": Likelihood(
        "values",
        lambda location, heads: ZeroInflated(
            Normal(location, _deviation(heads).expand_as(location), validate_args=False), heads["gate"]
        ),
        (Head("deviation", is_dispersion=True), GATE),
    ),
    "mse": Likelihood("values", lambda location, _: SquaredError(location)),
}
"""By the name in configurations."""

LikelihoodName = Literal[
    "poisson",
    "constrained_poisson",
    "negative_binomial",
    "zero_inflated_poisson",
    "zero_inflated_negative_binomial",
    "bernoulli",
    "gaussian",
    "log_normal",
    "softplus_gaussian",
    "multivariate_gaussian",
    "gaussian_mixture",
    "exponentially_modified_gaussian",
    "gamma",
    "lomax",
    "categorical",
    "zero_inflated_gaussian",
    "mse",
]


def squared_error(values: Tensor, mean: Tensor) -> Tensor:
    """Squared error: twice the negative log-likelihood of a Gaussian of unit variance, without its constant."""
    return (values - mean).square()


def normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, exp(log_variance)) from N(0, 1), per latent unit (Kingma & Welling 2014, arXiv:1312.6114, B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
