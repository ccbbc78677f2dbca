"""TabNet's encoder and its sparsemax."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from training.tabnet import TabNet, sparsemax

logits = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8)


@given(logits)
def test_sparsemax_is_the_nearest_point_of_the_simplex(values: list[float]) -> None:
    """Not negative, sums to one, and no point of the simplex that a general optimiser finds is nearer."""
    row = torch.tensor([values], dtype=torch.float64)
    found = sparsemax(row)[0].numpy()
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(), 1.0, atol=1e-9)
    start = np.full(len(values), 1 / len(values))
    best = minimize(
        lambda p: np.square(p - values).sum(),
        start,
        bounds=[(0, 1)] * len(values),
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
    )
    assert np.square(found - values).sum() <= best.fun + 1e-6


def test_sparsemax_has_zeros() -> None:
    """Martins & Astudillo's example in two dimensions: a difference of one or more leaves one entry."""
    torch.testing.assert_close(
        sparsemax(torch.tensor([[1.0, 0.0], [0.5, 0.0]])), torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    )


def test_a_gene_is_used_once_with_gamma_one() -> None:
    """With gamma 1 a gene that a mask took wholly has no prior left for the next mask."""
    torch.manual_seed(0)
    masks = []
    encoder = TabNet(6, 4, n_steps=2, gamma=1.0, dropout=0.0)
    for choose in encoder.choosers:
        choose.register_forward_hook(lambda _m, _i, out: masks.append(out))
    features = torch.randn(5, 6)
    decision, entropy = encoder(features)
    first = sparsemax(masks[0])
    second = sparsemax((1.0 - first) * masks[1])
    assert decision.shape == (5, 4)
    expected = -sum((m * torch.log(m + 1e-10)).sum(dim=1).mean() for m in (first, second)) / 2
    torch.testing.assert_close(entropy, expected)


def test_masked_genes_do_not_matter() -> None:
    """A gene that no mask lets through and that is not looked at to choose the first mask leaves the features as they are."""
    torch.manual_seed(0)
    encoder = TabNet(6, 4, n_steps=1, gamma=1.3, dropout=0.0).eval()
    chosen = []
    encoder.choosers[0].register_forward_hook(lambda _m, _i, out: chosen.append(sparsemax(out)))
    features = torch.randn(1, 6)
    encoder(features)
    mask = chosen[0]
    assert (mask == 0).any()
    other = torch.where(mask == 0, features + 1.0, features)
    torch.testing.assert_close(encoder._transform(1, mask * features), encoder._transform(1, mask * other))
