"""What the likelihoods make of a family: observed values, expected counts, what is refused, and what is exported."""

from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tests.training.families.test_families import N_GENES, build, example
from training.families.observing import ObservingFamily
from training.likelihoods import LIKELIHOODS, MAX_MULTIVARIATE_GENES, LikelihoodName
from training.onnx_graph import to_onnx

OBSERVING = ("atlas_vae", "autoencoder", "gmvae", "vae")


def settings_for(likelihood: str) -> dict[str, Any]:
    """A configuration in which the likelihood is allowed."""
    return {"likelihood": likelihood, **({"k_max": 4} if likelihood == "categorical" else {})}


def arguments(family: ObservingFamily) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latent, library and batch of the example's cells."""
    cells = example()
    with torch.no_grad():
        return family.encode(cells.counts), cells.counts.sum(dim=1), cells.batch


@pytest.mark.parametrize("dispersion", ["gene", "gene_batch", "gene_cell"])
@pytest.mark.parametrize(
    ("likelihood", "decode_library"),
    [(name, given) for name, one in LIKELIHOODS.items() for given in (True, *(() if one.is_constrained else (False,)))],
)
def test_loss_is_what_the_distribution_says(likelihood: str, dispersion: str, decode_library: bool) -> None:
    """The reconstruction is the sum over genes of -log_prob of what is observed; expected counts are finite and not negative."""
    family = build("vae", **settings_for(likelihood), dispersion=dispersion, decode_library=decode_library).eval()
    latent, library, batch = arguments(family)
    counts = example().counts
    with torch.no_grad():
        distribution = family.distribution(latent, library, batch)
        expected = -distribution.log_prob(family.observed(counts)).sum(dim=1)
        found = family.reconstruction(family.features(latent, library, batch), counts, batch)
        expression = family.decode(latent, library, batch)
    torch.testing.assert_close(found, expected)
    assert distribution.variance.shape == distribution.sample().shape == expression.shape == counts.shape
    assert bool(torch.isfinite(expression).all())
    assert bool((expression >= 0).all())


@pytest.mark.parametrize("likelihood", get_args(LikelihoodName))
def test_expected_counts_are_exported(likelihood: str) -> None:
    """ONNX Runtime in float32 against torch, within 1e-4 of the largest value; what the mean does not need is not in the file."""
    family = build("vae", **settings_for(likelihood), dispersion="gene_cell").eval()
    latent, library, batch = arguments(family)
    graph = family.graphs()["decode"]
    content = to_onnx(graph, {"latent": latent[:2], "library": library[:2], "batch": batch[:2]})
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, {"latent": latent.numpy(), "library": library.numpy(), "batch": batch.numpy()})[0]
    with torch.no_grad():
        expected = graph.module(latent, library, batch).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.max())
    assert b"to_log_theta" not in content


@pytest.mark.parametrize("name", OBSERVING)
def test_families_share_one_interface(name: str) -> None:
    """A distribution over what is observed, whatever the family."""
    family = build(name, likelihood="zero_inflated_negative_binomial").eval()
    latent, library, batch = arguments(family)
    distribution = family.distribution(latent, library, batch)
    assert distribution.log_prob(family.observed(example().counts)).shape == (6, N_GENES)


@pytest.mark.parametrize("name", OBSERVING)
def test_a_batch_that_is_unknown_is_explained_as_the_average(name: str) -> None:
    """Cells of a batch that was held out have -1; every family validates them."""
    import dataclasses

    family = build(
        name, decoder_uses_batch=True, mmd_weight=0.0, dispersion="gene_batch", likelihood="negative_binomial"
    ).eval()
    unknown = dataclasses.replace(example(), batch=torch.full((6,), -1))
    torch.manual_seed(0)
    lost = family.loss(unknown)
    assert all(bool(torch.isfinite(value)) for value in lost.values())
    torch.manual_seed(0)
    assert lost["loss"] != family.loss(example())["loss"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"likelihood": "categorical"}, "needs k_max"),
        ({"likelihood": "bernoulli", "k_max": 3, "decode_library": False}, "another say on small counts"),
        ({"likelihood": "zero_inflated_poisson", "k_max": 3, "decode_library": False}, "another say on small counts"),
        ({"likelihood": "poisson", "k_max": 3}, "decode_library: false"),
        ({"likelihood": "constrained_poisson", "decode_library": False}, "a share of the library"),
        ({"input": "counts", "scale": True}, "means and deviations"),
    ],
)
def test_what_cannot_be_had_is_refused(settings: dict[str, Any], said: str) -> None:
    """With a reason."""
    with pytest.raises(ValueError, match=said):
        build("vae", **settings)


def test_a_covariance_of_too_many_genes_is_refused() -> None:
    """It would not fit into memory."""
    from training.families import FAMILIES
    from training.families.family import Dimensions, Statistics

    n = MAX_MULTIVARIATE_GENES + 1
    family = FAMILIES["vae"]
    with pytest.raises(ValueError, match="500 genes at most, and there are 501"):
        family(
            family.defaults(likelihood="multivariate_gaussian"),
            Dimensions(n, 1, {}),
            Statistics(torch.zeros(n), torch.ones(n), {}),
        )


@pytest.mark.parametrize("given", ["log_normalised", "log_counts", "counts", "binary"])
def test_inputs_are_inside_the_graph(given: str) -> None:
    """The encoder takes raw counts, whatever it makes of them."""
    family = build("autoencoder", input=given, scale=False, clip=None)
    counts = example().counts
    expected = {
        "log_normalised": torch.log(counts / counts.sum(dim=1, keepdim=True) * 1e4 + 1),
        "log_counts": torch.log(counts + 1),
        "counts": counts,
        "binary": (counts > 0).float(),
    }[given]
    torch.testing.assert_close(family.transform(counts), expected)
    library = counts.sum(dim=1)
    back = family.transform.expected_counts(expected, library)
    torch.testing.assert_close(back, (counts > 0).float() if given == "binary" else counts, rtol=1e-4, atol=1e-4)
