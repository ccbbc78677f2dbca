"""Surface proteins: counts of antibodies on a common scale."""

import torch
from torch import Tensor, nn


class CentredLogRatio(nn.Module):
    """ln(1 + counts / g) for each antibody, g its geometric mean over training cells, then centred and scaled.

    Seurat's CLR with margin 2 followed by ScaleData, as the published data have it (Hao et al. 2021, doi:10.1016/j.cell.2021.04.048),
    with means taken once from the training cells: a query of one cell is transformed as a query of a million.
    """

    def __init__(self, counts: Tensor) -> None:
        """Measure the training cells.

        Args:
            counts: of antibodies, shape (n_training_cells, n_antibodies), NaN where unknown.
        """
        super().__init__()
        known = counts.double()
        log_mean = torch.log1p(known).nanmean(dim=0)
        values = torch.log1p(known / log_mean.exp())
        mean = values.nanmean(dim=0)
        deviation = (values - mean).square().nanmean(dim=0).sqrt()
        # A constant antibody, or one that no training cell has, stays as it is.
        self.register_buffer("log_mean", torch.nan_to_num(log_mean).float())
        self.register_buffer("mean", torch.nan_to_num(mean).float())
        self.register_buffer("std", torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)).float())

    def forward(self, counts: Tensor) -> Tensor:
        """Counts (n, n_antibodies) to the same shape; NaN stays NaN."""
        return (torch.log(counts * torch.exp(-self.log_mean) + 1.0) - self.mean) / self.std

    def expected_counts(self, values: Tensor) -> Tensor:
        """Undo the transform: counts, not negative; the bound e^15 keeps a far extrapolation finite."""
        return (torch.exp((values * self.std + self.mean).clamp(0.0, 15.0)) - 1.0) * self.log_mean.exp()
