"""What is exported of a run: the graphs of its family, and what the export adds to them."""

from torch import Tensor, nn

from training.families.family import Family, Graph
from training.families.observing import ObservingFamily

VARIANCE = "expression_variance"


class Exported(nn.Module):
    """A fitted family with the additions that an export asks for; `graphs` is as a family's."""

    def __init__(self, family: Family, has_spread: bool, projector: nn.Module | None = None) -> None:
        """Put together.

        Args:
            family: fitted.
            has_spread: let decode give the variance of counts too, where the likelihood is one of counts.
            projector: latent (n, n_latent) → umap (n, 2).
        """
        super().__init__()
        self.family, self.projector = family, projector
        self.has_spread = has_spread and isinstance(family, ObservingFamily) and family.explains == "counts"

    def graphs(self) -> dict[str, Graph]:
        """Modules to export by the names of the manifest."""
        graphs = self.family.graphs()
        if self.has_spread:
            decode = graphs["decode"]
            assert decode.outputs == ("expression",), "families of counts decode nothing else"
            graphs["decode"] = Graph(DecodeSpread(self.family), decode.inputs, (*decode.outputs, VARIANCE))
        if self.projector is not None:
            graphs["project"] = Graph(self.projector, ("latent",), ("umap",))
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
