"""describe: label, how sure, what else, whether the reference has it, where it lies and which genes say so, in one answer."""

from typing import Any

import scipy.sparse as sp
from pydantic import Field

from service.cells.columns import Column, Columns
from service.contract.manifest import MAX_NEIGHBOURS
from service.inference import annotate, explain, mapping
from service.inference.annotate import AnnotateOptions
from service.inference.explain import MAX_TOP, ExplainOptions
from service.inference.mapping import MapOptions
from service.inference.model import Model
from service.inference.task import Options, Task


class DescribeOptions(AnnotateOptions):
    """How much of each."""

    top_k: int = Field(3, ge=1, le=1000, description="Classes to name per cell, the most probable first.")
    coverage: float = Field(
        0.95, gt=0, lt=1, description="Share of cells whose `prediction_set` is to hold their true class."
    )
    k: int = Field(5, gt=0, le=MAX_NEIGHBOURS, description="Reference cells to give per cell, nearest first.")
    top: int = Field(10, ge=1, le=MAX_TOP, description="Genes to give per cell, those that speak loudest first.")

    def parts(self, model: Model) -> list[tuple[Task, Options]]:
        """The tasks that the answer is made of, as far as the model offers them, with their options."""
        wanted = self.model_dump(include={"top_k", "unknown_threshold"})
        if model.prediction_sets is not None or "coverage" in self.model_fields_set:
            wanted["coverage"] = self.coverage
        k = self.k
        if model.reference is not None and "k" not in self.model_fields_set:
            k = min(k, len(model.reference))
        parts: list[tuple[Task, Options]] = [
            (annotate.TASK, AnnotateOptions(**wanted)),
            (mapping.TASK, MapOptions(k=k)),
            (explain.TASK, ExplainOptions(top=self.top)),
        ]
        return [(task, options) for task, options in parts if task.offered_by(model)]

    def check(self, model: Model) -> None:
        """Refuse what one of the parts refuses."""
        for _, options in self.parts(model):
            options.check(model)

    def about(self, model: Model) -> dict[str, Any]:
        """What the parts say."""
        return {name: value for _, options in self.parts(model) for name, value in options.about(model).items()}


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
    """The columns of annotate, map and explain, but for those that only their own readers want."""
    assert isinstance(options, DescribeOptions)
    columns: dict[str, Column] = {}
    for task, own in options.parts(model):
        columns |= task.run(model, counts, own)
    suffixes = ("", *(f"_{level.name}" for level in model.manifest.labels))
    left_out = {f"{name}{suffix}" for name in ("probabilities", "classified_labels") for suffix in suffixes}
    left_out |= {"explained", "value", "baseline_value", "n_steps"}
    is_empty = columns.pop("is_empty")
    return {name: column for name, column in columns.items() if name not in left_out} | {"is_empty": is_empty}


TASK = Task(
    name="describe",
    summary="All that is known of the cells: label, how sure, what else, where they lie among reference cells, which genes say so",
    description=(
        "The columns of `annotate` (with `top_k` classes and a prediction set), `map` and `explain` in one answer, as far as the model "
        "has what they need, without `probabilities`, `classified_labels` and the values of `explain`: ask those tasks for them, and for their "
        "further options. Each number has the same bits as there."
    ),
    graphs=("encode", "classify"),
    run=run,
    options=DescribeOptions,
    is_composite=True,
)
