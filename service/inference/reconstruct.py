"""reconstruct: the denoised expression of cells."""

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from service.cells.columns import Columns, Vectors
from service.errors import InvalidOption
from service.inference.embed import is_empty
from service.inference.model import Model
from service.inference.task import Options, Task


class ReconstructOptions(Options):
    """For which genes, batch and depth expression is given."""

    genes: str | None = Field(
        None, description="Comma-separated gene ids or symbols to give; all genes of the model by default."
    )
    batch: str | None = Field(
        None,
        description="Batch of the reference as if cells came from it, or 'average' over all of them; by default as the manifest says.",
    )
    library_size: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Counts per cell to scale to, over the model's genes; by default each cell's own.",
    )

    def check(self, model: Model) -> None:
        """Refuse genes and batches that the model does not have."""
        self.positions(model)
        if self.batch not in (None, "average", *model.manifest.batch.names):
            known = ", ".join(("average", *model.manifest.batch.names))
            raise InvalidOption(name="batch", problem=f"'{str(self.batch)[:60]}' is not one of: {known}.")

    def positions(self, model: Model) -> list[int]:
        """Positions of the genes to give."""
        if self.genes is None:
            return list(range(model.manifest.genes.n_genes))
        names = [name.strip() for name in self.genes.split(",") if name.strip()]
        positions = [model.genes.find(name) for name in names]
        if unknown := [name[:40] for name, at in zip(names, positions, strict=True) if at < 0]:
            raise InvalidOption(
                name="genes",
                problem=f"{model.id} does not have {', '.join(unknown[:10])}. GET /v1/models shows where its genes are.",
            )
        if not names or len(set(positions)) != len(positions):
            raise InvalidOption(name="genes", problem="name each gene once, and at least one.")
        return positions


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
    """Expected counts of shape (n_cells, n_genes asked for), float32."""
    assert isinstance(options, ReconstructOptions)
    positions = options.positions(model)
    own = np.asarray(counts.sum(axis=1, dtype=np.float32)).ravel()
    library_size = own if options.library_size is None else np.full(len(own), options.library_size, dtype=np.float32)
    expression = model.decode(model.encode(counts), library_size, options.batch)
    if options.genes is not None:
        expression = np.ascontiguousarray(expression[:, positions])
    return {
        "expression": Vectors(expression, tuple(model.genes.display(at) for at in positions)),
        "is_empty": is_empty(counts),
    }


TASK = Task(
    name="reconstruct",
    summary="The denoised expression of the cells",
    description=(
        "`expression`: expected counts per gene (the likelihood's mean, deterministic), named by gene symbol.\n\n"
        "`is_empty`: true for a cell without a single count in the model's genes; at its own library size its expression is zero."
    ),
    graphs=("encode", "decode"),
    run=run,
    options=ReconstructOptions,
)
