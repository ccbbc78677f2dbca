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
        self.names = tuple(level.name for level in levels)
        self.n_batches = len(levels[0].codes)
        codes = torch.tensor([[*level.codes, len(level.values)] for level in levels])
        self.register_buffer("codes", codes, persistent=False)
        """By level and batch, the average last: row of the level's table."""
        if kind == "embedding":
            self.tables = nn.ParameterList(torch.randn(len(level.values), width) for level in levels)
        else:
            self.tables = nn.ParameterList(
                nn.Parameter(torch.eye(len(level.values)), requires_grad=False) for level in levels
            )
        self.width = sum(table.shape[1] for table in self.tables)

    def known_or_average(self, batch: Tensor) -> Tensor:
        """Batches int64 (n,), -1 for a batch that the model does not know, as indices that `forward` takes."""
        return torch.where(batch < 0, torch.full_like(batch, self.n_batches), batch)

    def forward(self, batch: Tensor) -> Tensor:
        """Batches int64 (n,), from 0 to n_batches, to vectors (n, width)."""
        parts = []
        for codes, table in zip(self.codes, self.tables, strict=True):
            whole = torch.cat([table, table.mean(dim=0, keepdim=True)])
            parts.append(nn.functional.embedding(nn.functional.embedding(batch, codes[:, None]).squeeze(1), whole))
        return torch.cat(parts, dim=1)
