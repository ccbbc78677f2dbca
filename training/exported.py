"""The graphs of a family as they are exported."""

from collections.abc import Sequence

from torch import Tensor, nn

from service.contract.annotation import LabelLevel
from training.calibration.graphs import complete
from training.calibration.stored import Calibration
from training.families.family import Family, Graph
from training.families.observing import ObservingFamily
from training.sparse_input import serving_graphs

VARIANCE = "expression_variance"


def exported_graphs(
    family: Family, has_spread: bool, levels: Sequence[LabelLevel] = (), calibration: Calibration | None = None
) -> dict[str, Graph]:
    """Modules to export by the names of the manifest, encode first.

    Args:
        family: fitted.
        has_spread: let decode give the variance of counts too, where the likelihood is one of counts.
        levels: label levels of the data.
        calibration: what `calibrate` found, if it was run.
    """
    # A mapping score may need the decoder, and no variance.
    graphs = complete(serving_graphs(family), levels, calibration)
    if has_spread and isinstance(family, ObservingFamily) and family.explains == "counts":
        decode = graphs["decode"]
        assert decode.outputs == ("expression",), "families of counts decode nothing else"
        graphs["decode"] = Graph(DecodeSpread(family), decode.inputs, (*decode.outputs, VARIANCE))
    return graphs


class DecodeSpread(nn.Module):
    """latent (n, n_latent), library (n,), batch int64 (n,) → expression and its variance, both (n, n_genes)."""

    def __init__(self, family: ObservingFamily) -> None:
        super().__init__()
        self.family = family

    def forward(self, latent: Tensor, library: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the likelihood of cells with `library` counts."""
        found = self.family.distribution(latent, library, batch)
        return found.mean, found.variance
