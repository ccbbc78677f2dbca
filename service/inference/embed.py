"""embed: where cells lie in the reference."""

import scipy.sparse as sp

from service.cells.columns import Columns, Values, Vectors
from service.cells.counts import row_sums
from service.inference.model import Model
from service.inference.task import Options, Task


def is_empty(counts: sp.csr_matrix) -> Values:
    """Whether a cell has no count at all in the genes of the model, shape (n_cells,)."""
    return Values(row_sums(counts) == 0)


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:  # noqa: ARG001 - a task's signature
    """Latent of shape (n_cells, n_latent), float32."""
    return {"latent": Vectors(model.encode(counts)), "is_empty": is_empty(counts)}


TASK = Task(
    name="embed",
    summary="Where the cells lie in the latent space of the reference",
    description=(
        "`latent`: float32 vector per cell, the mean of the posterior (deterministic).\n\n"
        "`is_empty`: true for a cell without a single count in the model's genes; its latent is that of an empty cell and means nothing."
    ),
    graphs=("encode",),
    run=run,
)
