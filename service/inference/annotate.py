"""annotate: what cells are, how sure that is, what else they could be, and whether they are of the reference at all."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from service.cells.columns import Column, Columns, LabelLists, Labels, Values, Vectors
from service.contract.annotation import LabelLevel, parent_codes
from service.errors import InvalidOption
from service.inference.embed import is_empty
from service.inference.model import Model
from service.inference.task import Options, Task

UNKNOWN = "Unknown"


class AnnotateOptions(Options):
    """What is answered beside the label, and which cells are Unknown."""

    top_k: int | None = Field(
        None, ge=1, le=1000, description="How many classes to name per cell, the most probable first; none by default."
    )
    coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of cells whose `prediction_set` is to hold their true class, for example 0.95; no sets by default.",
    )
    unknown_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Cells with a lower `mapping_score` are Unknown; by default the model's own threshold, and 0 turns it off.",
    )

    def check(self, model: Model) -> None:
        """Refuse what the artifact holds no figures for."""
        if self.coverage is not None and model.prediction_sets is None:
            raise InvalidOption(name="coverage", problem=f"{model.id} was exported without calibration scores.")
        if self.unknown_threshold is not None and model.manifest.unknown is None:
            raise InvalidOption(name="unknown_threshold", problem=f"{model.id} was exported without a mapping score.")

    def about(self, model: Model) -> dict[str, Any]:
        """The threshold and the coverage that were used, where there are any."""
        about: dict[str, Any] = {}
        if model.manifest.unknown is not None:
            about["unknown_threshold"] = self.threshold(model)
        if self.coverage is not None:
            about["coverage"] = self.coverage
        return about

    def threshold(self, model: Model) -> float:
        """The mapping score below which cells are Unknown."""
        if self.unknown_threshold is not None:
            return self.unknown_threshold
        return model.manifest.unknown.threshold if model.manifest.unknown is not None else 0.0


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
    """Labels, confidence and probabilities per label level; an empty cell is Unknown with confidence 0."""
    assert isinstance(options, AnnotateOptions)
    empty = is_empty(counts)
    is_empty_cell = empty.values.astype(bool)
    is_unknown, latent, mapping = is_empty_cell, None, {}
    if model.manifest.unknown is not None:
        latent = model.encode(counts)
        score = np.where(is_empty_cell, np.float32(0), model.mapping_score(counts, latent))
        mapping = {"mapping_score": Values(score)}
        is_unknown = is_unknown | (score < np.float32(options.threshold(model)))
    columns: dict[str, Column] = {}
    classified = model.classify(counts, latent)
    best = best_classes(model.manifest.labels, classified)
    for level, probabilities in zip(model.manifest.labels, classified.values(), strict=True):
        found = _answers(level, probabilities, best[level.name], is_unknown, is_empty_cell)
        if options.top_k is not None:
            found |= _top(level, probabilities, options.top_k)
        sets = model.prediction_sets
        # A level without calibration cells, for example of clusters that the network found itself, has no sets.
        if options.coverage is not None and sets is not None and level.name in sets.levels:
            codes = sets.codes(level.name, probabilities, options.coverage)
            # Nothing is known of an empty cell, so nothing is excluded.
            codes[is_empty_cell] = np.arange(len(level.classes), dtype=np.int32)
            found["prediction_set"] = LabelLists(codes, level.classes, is_ragged=True)
        # The first level is what people mean by "the" label; further levels carry their name.
        suffix = "" if level is model.manifest.labels[0] else f"_{level.name}"
        columns |= {f"{name}{suffix}": column for name, column in found.items()}
    return {**columns, **mapping, "is_empty": empty}


def best_classes(
    levels: tuple[LabelLevel, ...], probabilities: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.int64]]:
    """The most probable class of each cell by level, as `predicted_labels` names it, codes (n_cells,).

    On a finer level the most probable child of the one before, so that labels never contradict.
    """
    best: dict[str, NDArray[np.int64]] = {}
    for level in levels:
        found = probabilities[level.name]
        if level.parent is not None:
            is_child = parent_codes(levels, level)[None, :] == best[level.parent][:, None]
            found = np.where(is_child, found, np.float32(-1))
        best[level.name] = np.argmax(found, axis=1)
    return best


def _answers(
    level: LabelLevel,
    probabilities: NDArray[np.float32],
    best: NDArray[np.int64],
    is_unknown: NDArray[np.generic],
    is_empty: NDArray[np.generic],
) -> dict[str, Column]:
    return {
        "predicted_labels": Labels(
            np.where(is_unknown, len(level.classes), best).astype(np.int32), (*level.classes, UNKNOWN)
        ),
        "conf_score": Values(np.where(is_empty, np.float32(0), probabilities[np.arange(len(best)), best])),
        "probabilities": Vectors(probabilities, level.classes),
    }


def _top(level: LabelLevel, probabilities: NDArray[np.float32], k: int) -> dict[str, Column]:
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return {
        "top_labels": LabelLists(order.astype(np.int32), level.classes),
        "top_scores": Vectors(np.take_along_axis(probabilities, order, axis=1)),
    }


TASK = Task(
    name="annotate",
    summary="The cell types of the cells, how sure that is, and whether the reference has them",
    description=(
        "`predicted_labels`: the most probable class; `Unknown` for a cell without a count in the model's genes, and for one whose "
        "`mapping_score` is below the threshold that the head names.\n\n"
        "`conf_score`: probability of the most probable class, 0 to 1, also where the label is `Unknown`; 0 for an empty cell. It is "
        "calibrated where the manifest says so.\n\n"
        "`probabilities`: of every class, named.\n\n"
        "`top_labels`, `top_scores` (with `top_k`): the most probable classes and their probabilities.\n\n"
        "`prediction_set` (with `coverage`): the classes that the cell may be, the most probable first. Over cells like the reference's, the "
        "asked share of sets holds the true class. An empty set says that no class is typical enough at this coverage: ask for more.\n\n"
        "`mapping_score`, where the model has one: how well the cell fits the reference, 0 to 1, as the share of held-out cells of the "
        "reference that fit as badly or worse.\n\n"
        "`is_empty`: true for a cell without a single count in the model's genes.\n\n"
        "Further label levels of a model follow as `predicted_labels_<level>` and so on. Where a level divides another, its label is the most "
        "probable child of that level's label, and probabilities of children add up to their parent's."
    ),
    graphs=("encode", "classify"),
    run=run,
    options=AnnotateOptions,
)
