"""Technical batches of one or several levels as features of a decoder, with a code for the average batch."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from training.families.family import BatchLevel


class BatchLevels(nn.Module):
    """A vector per batch: for each level (study, donor) a learned embedding or a one-hot code, side by side.

    The index n_batches means the average batch: in each level the mean over its values. Cells of a batch that was never trained on are
    decoded with it.
    """

    def __init__(self, levels: Sequence[BatchLevel], kind: Literal["embedding", "one_hot"], width: int) -> None:
        """Prepare the codes.

        Args:
            levels: the columns that batches are combinations of.
            kind: embedding: as scAtlasVAE and scPoli (De Donno et al. 2023, doi:10.1038/s41592-023-02035-2); one_hot: as scVI.
            width: of each level's embedding.
        """
        super().__init__()
        self.n_batches = len(levels[0].codes)
        codes = torch.tensor([[*level.codes, len(level.values)] for level in levels])
        self.register_buffer("codes", codes, persistent=False)
        """By level and batch, the average last: row of the level's table."""
        self.levels = tuple(levels)
        self.is_embedding = kind == "embedding"
        for i, level in enumerate(levels):
            if self.is_embedding:
                self.register_parameter(f"table_{i}", nn.Parameter(torch.randn(len(level.values), width)))
            else:
                self.register_buffer(f"table_{i}", torch.eye(len(level.values)), persistent=False)
        self.width = sum(width if self.is_embedding else len(level.values) for level in levels)

    def known_or_average(self, batch: Tensor) -> Tensor:
        """Batches int64 (n,), -1 for a batch that the model does not know, as indices that `forward` takes."""
        return torch.where(batch < 0, torch.full_like(batch, self.n_batches), batch)

    def forward(self, batch: Tensor) -> Tensor:
        """Batches int64 (n,), from 0 to n_batches, to vectors (n, width)."""
        parts = []
        for i, codes in enumerate(self.codes):
            table = self.get_parameter(f"table_{i}") if self.is_embedding else self.get_buffer(f"table_{i}")
            whole = torch.cat([table, table.mean(dim=0, keepdim=True)])
            parts.append(nn.functional.embedding(nn.functional.embedding(batch, codes[:, None]).squeeze(1), whole))
        return torch.cat(parts, dim=1)
