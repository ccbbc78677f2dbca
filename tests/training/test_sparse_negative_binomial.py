"""The sparse likelihood gives the bits of the plain formula, values and gradients alike."""

import pytest
import torch

from training import sparse_negative_binomial as nb


@pytest.mark.parametrize("mean_count", [0.0, 0.1, 3.0, 1e5])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_bits_are_those_of_the_plain_formula(mean_count: float, is_weighted: bool) -> None:
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((37, 211), mean_count) * torch.rand(37, 211))
    logits, log_theta, weight = torch.randn(37, 211), 2 * torch.randn(211), torch.rand(37, 211)
    answers = []
    for formula in (nb.plain, nb.log_likelihood):
        x, t = logits.clone().requires_grad_(), log_theta.clone().requires_grad_()
        mean = torch.softmax(x, dim=1) * counts.sum(dim=1, keepdim=True).clamp(min=1.0)
        value = formula(counts, mean, t.exp() + 1e-4)
        loss = (value * weight).sum() if is_weighted else -value.sum(dim=1).mean()
        loss.backward()
        answers.append((value.detach(), x.grad, t.grad))
    for plain, sparse in zip(*answers, strict=True):
        assert torch.equal(plain, sparse)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    counts = torch.poisson(torch.rand(5, 7, dtype=torch.float64))
    mean = (torch.rand(5, 7, dtype=torch.float64) + 0.1).requires_grad_()
    theta = (torch.rand(7, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, t: nb.log_likelihood(counts, m, t), (mean, theta))


def test_a_dispersion_per_cell_takes_the_plain_formula() -> None:
    counts, mean = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 1.0]])
    per_cell = nb.log_likelihood(counts, mean, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(per_cell, nb.log_likelihood(counts, mean, torch.tensor([1.0, 3.0])))
