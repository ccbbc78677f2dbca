"""annotate: what cells are, and how sure that is."""

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.columns import Column, Columns, Labels, Values, Vectors
from service.contract.manifest import LabelLevel
from service.inference.embed import is_empty
from service.inference.model import Model
from service.inference.task import Options, Task

UNKNOWN = "Unknown"


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:  # noqa: ARG001 - a task's signature
    """Labels, confidence and probabilities per label level; an empty cell is Unknown with confidence 0."""
    empty = is_empty(counts)
    columns: dict[str, Column] = {}
    for level, probabilities in zip(model.manifest.labels, model.classify(counts).values(), strict=True):
        # The first level is what people mean by "the" label; further levels carry their name.
        suffix = "" if level is model.manifest.labels[0] else f"_{level.name}"
        columns |= {f"{name}{suffix}": column for name, column in _answers(level, probabilities, empty.values).items()}
    return {**columns, "is_empty": empty}


def _answers(level: LabelLevel, probabilities: NDArray[np.float32], empty: NDArray[np.generic]) -> dict[str, Column]:
    best = probabilities.argmax(axis=1)
    return {
        "predicted_labels": Labels(
            np.where(empty, len(level.classes), best).astype(np.int32), (*level.classes, UNKNOWN)
        ),
        "conf_score": Values(np.where(empty, np.float32(0), probabilities[np.arange(len(best)), best])),
        "probabilities": Vectors(probabilities, level.classes),
    }


TASK = Task(
    name="annotate",
    summary="The cell types of the cells, and how sure that is",
    description=(
        "`predicted_labels`: the most probable class, or `Unknown` for a cell without a count in the model's genes.\n\n"
        "`conf_score`: its probability, 0 to 1.\n\n"
        "`probabilities`: of every class, named.\n\n"
        "`is_empty`: true for a cell without a single count in the model's genes.\n\n"
        "Further label levels of a model follow as `predicted_labels_<level>` and so on."
    ),
    graphs=("encode", "classify"),
    run=run,
)
