"""TabNet's encoder: genes are chosen step by step by sparse masks (Arik & Pfister 2021, doi:10.1609/aaai.v35i8.16826)."""

import math

import torch
from torch import Tensor, nn


def sparsemax(logits: Tensor) -> Tensor:
    """Projection of each row onto the simplex, which has zeros where softmax has small numbers (Martins & Astudillo 2016, arXiv:1602.02068).

    Args:
        logits: (n, n_columns).

    Returns:
        Of the same shape, not negative, with rows that sum to 1.
    """
    descending = torch.sort(logits, dim=1, descending=True).values
    rank = torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)
    # The support is the first columns in this order, so that no gather is needed for their sum.
    in_support = (1.0 + rank * descending > torch.cumsum(descending, dim=1)).to(logits.dtype)
    threshold = ((descending * in_support).sum(dim=1, keepdim=True) - 1.0) / in_support.sum(dim=1, keepdim=True)
    return torch.relu(logits - threshold)


class TabNet(nn.Module):
    """Decision features (n, width) of a cell, summed over `n_steps` steps, each of which looks at the genes that its mask lets through."""

    def __init__(self, n_inputs: int, width: int, n_steps: int, gamma: float, dropout: float) -> None:
        """Build the encoder.

        Args:
            n_inputs: number of genes.
            width: of what each step gives; another `width` units choose the next mask.
            n_steps: masks.
            gamma: 1: a gene is used in one step only; larger: it may be used again.
            dropout: share of the result's units dropped while training.
        """
        super().__init__()
        self.width, self.gamma = width, gamma
        # Half of each layer's units gate the other half (GLU).
        self.shared = nn.ModuleList([nn.Linear(n_inputs, 4 * width), nn.Linear(2 * width, 4 * width)])
        self.own = nn.ModuleList(
            nn.ModuleList(nn.Linear(2 * width, 4 * width) for _ in range(2)) for _ in range(n_steps + 1)
        )
        # LayerNorm and not the paper's ghost batch norm: a cell must not depend on its company.
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(4 * width) for _ in range(4)) for _ in range(n_steps + 1))
        self.choosers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, n_inputs), nn.LayerNorm(n_inputs)) for _ in range(n_steps)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, n_inputs) to decision features (n, width) and the masks' mean entropy, a scalar that sparsity makes small."""
        prior = torch.ones_like(features)
        total, entropy = features.new_zeros(()), features.new_zeros(())
        attention = self._transform(0, features)[:, self.width :]
        for step, choose in enumerate(self.choosers):
            mask = sparsemax(prior * choose(attention))
            entropy = entropy - (mask * torch.log(mask + 1e-10)).sum(dim=1).mean() / len(self.choosers)
            prior = prior * (self.gamma - mask)
            found = self._transform(step + 1, mask * features)
            total = total + torch.relu(found[:, : self.width])
            attention = found[:, self.width :]
        return self.dropout(total), entropy

    def _transform(self, step: int, features: Tensor) -> Tensor:
        found = features
        for i, (linear, norm) in enumerate(zip([*self.shared, *self.own[step]], self.norms[step], strict=True)):
            new = nn.functional.glu(norm(linear(found)), dim=1)
            found = new if i == 0 else (found + new) * math.sqrt(0.5)
        return found
