"""The discrepancy between batches, against scikit-learn's kernels."""

import numpy as np
import torch
from sklearn.metrics.pairwise import rbf_kernel

from training import mmd


def cells(n_cells: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_cells, 3, generator=torch.Generator().manual_seed(seed))


def by_hand(one: torch.Tensor, other: torch.Tensor) -> float:
    """Squared discrepancy of two groups with scikit-learn's radial kernel."""

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return sum(rbf_kernel(x.double(), y.double(), gamma=1 / (2 * b)).mean() for b in mmd.BANDWIDTHS)

    return kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)


def test_two_batches() -> None:
    """One pair: what scikit-learn's kernels give."""
    latent, batch = cells(), torch.arange(24) % 2
    found = mmd.discrepancy(latent, batch)
    np.testing.assert_allclose(found, by_hand(latent[::2], latent[1::2]), rtol=1e-4)


def test_three_batches_are_averaged_over_pairs() -> None:
    """The number of batches does not change the weight of the loss."""
    latent, batch = cells(), torch.arange(24) % 3
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([by_hand(latent[batch == i], latent[batch == j]) for i, j in pairs])
    np.testing.assert_allclose(mmd.discrepancy(latent, batch), expected, rtol=1e-4)


def test_shifted_batches_differ_more() -> None:
    """A shift is seen, and its gradient pulls the batches together."""
    latent, batch = cells(200), torch.arange(200) % 2
    shifted = (latent + 3.0 * batch[:, None]).requires_grad_()
    found = mmd.discrepancy(shifted, batch)
    found.backward()
    assert found > 10 * mmd.discrepancy(latent, batch)
    assert (shifted.grad[batch == 1].mean(dim=0) > 0).all()
    assert (shifted.grad[batch == 0].mean(dim=0) < 0).all()


def test_nothing_to_compare() -> None:
    """One batch, single cells or unknown batches give 0, which has a gradient to add up."""
    latent = cells(4).requires_grad_()
    for batch in ([0, 0, 0, 0], [0, 1, 2, 3], [-1, -1, 0, 0]):
        assert float(mmd.discrepancy(latent, torch.tensor(batch)).detach()) == 0


def test_hierarchy() -> None:
    """Between studies, and between donors within each study; donors of different studies are not compared."""
    latent = cells()
    study, donor = torch.arange(24) // 12, torch.arange(24) // 6
    within = [by_hand(latent[:6], latent[6:12]), by_hand(latent[12:18], latent[18:])]
    expected = by_hand(latent[:12], latent[12:]) + np.mean(within)
    np.testing.assert_allclose(mmd.hierarchical_discrepancy(latent, [study, donor]), expected, rtol=1e-4)
