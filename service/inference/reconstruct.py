"""reconstruct: the denoised expression of cells."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from service.cells.columns import Column, Columns, Vectors
from service.cells.counts import row_sums
from service.errors import InvalidOption
from service.inference.embed import is_empty
from service.inference.model import VARIANCE, Model
from service.inference.task import Options, Task


class ReconstructOptions(Options):
    """For which genes, batch and depth expression is given."""

    genes: str | None = Field(
        None, description="Comma-separated gene ids or symbols to give; all genes of the model by default."
    )
    batch: str | None = Field(
        None,
        description="Batch of the reference as if cells came from it, or 'average' over all of them; by default as the manifest says. "
        "A batch that the reference does not have is refused or taken for the default, as the manifest says.",
    )
    library_size: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Counts per cell to scale to, over the model's genes; by default each cell's own.",
    )

    spread: bool = Field(
        False,
        description="Give `expression_sd` too: the standard deviation of a count under the model's own likelihood. For models whose "
        "likelihood is one of counts, and that were exported with it.",
    )

    def check(self, model: Model) -> None:
        """Refuse genes and batches that the model does not have, and a spread that its decoder does not give."""
        if self.spread and VARIANCE not in model.sessions["decode"].outputs:
            raise InvalidOption(
                name="spread", problem=f"{model.id} has no likelihood of counts, or was exported without it."
            )
        self.positions(model)
        if model.manifest.batch.unseen == "refuse" and not self._has_batch(model):
            known = ", ".join(("average", *model.manifest.batch.names))
            raise InvalidOption(name="batch", problem=f"'{str(self.batch)[:60]}' is not one of: {known}.")

    def about(self, model: Model) -> dict[str, Any]:
        """As which batch the cells were decoded, and how good the values beside expression are."""
        policy = model.manifest.batch
        about: dict[str, Any] = {
            "batch": {
                "asked": self.batch if self.batch is None else self.batch[:60],
                "decoded_as": self.decoded_as(model),
                "is_known": self._has_batch(model),
            }
        }
        if about["batch"]["decoded_as"] == "average":
            about["batch"]["average_of"] = "expressions" if policy.average_index is None else "batch codes"
        if model.manifest.modalities:
            about["modalities"] = {
                modality.name: {
                    "unit": modality.unit,
                    "is_measured": False,
                    "quality_metric": modality.quality_metric,
                    "quality": modality.quality,
                }
                for modality in model.manifest.modalities
            }
        return about

    def decoded_as(self, model: Model) -> str:
        """The batch that the cells are decoded as: the one asked for if the reference has it, else the manifest's default."""
        return self.batch if self.batch is not None and self._has_batch(model) else model.manifest.batch.decode_default

    def _has_batch(self, model: Model) -> bool:
        return self.batch in (None, "average", *model.manifest.batch.names)

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
    """Expected counts of shape (n_cells, n_genes asked for), float32, and the model's modalities."""
    assert isinstance(options, ReconstructOptions)
    positions = options.positions(model)
    own = row_sums(counts).astype(np.float32)
    library_size = own if options.library_size is None else np.full(len(own), options.library_size, dtype=np.float32)
    genes = None if options.genes is None else np.array(positions, dtype=np.intp)
    decoded = model.decode_all(model.encode(counts), library_size, options.decoded_as(model), genes, options.spread)
    names = tuple(model.genes.display(at) for at in positions)
    spread: dict[str, Column] = {"expression_sd": Vectors(np.sqrt(decoded[VARIANCE]), names)} if options.spread else {}
    return {
        "expression": Vectors(decoded["expression"], names),
        **spread,
        **{modality.name: Vectors(decoded[modality.name], modality.features) for modality in model.manifest.modalities},
        "is_empty": is_empty(counts),
    }


TASK = Task(
    name="reconstruct",
    summary="The denoised expression of the cells",
    description=(
        "`expression`: expected counts per gene (the likelihood's mean, deterministic), named by gene symbol.\n\n"
        "`expression_sd`: with `spread=true`, how far a count would lie from that, drawn from the model's likelihood: one standard "
        "deviation, in counts. It is what the model takes for noise of counting and between like cells; how sure the model is of the mean "
        "itself is not in it.\n\n"
        "`is_empty`: true for a cell without a single count in the model's genes; at its own library size its expression is zero.\n\n"
        "Where the manifest names `modalities`, each is a column of its own (for example `protein`), named by its features. Such values "
        "are imputed from the counts, never measured; the head says how good they are (`modalities`), and as which `batch` cells were decoded."
    ),
    graphs=("encode", "decode"),
    run=run,
    options=ReconstructOptions,
)
