"""map: where cells lie among the reference cells, and what these are."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from service.cells.columns import Column, Columns, LabelLists, Labels, Values, Vectors
from service.contract.annotation import LabelLevel
from service.contract.manifest import MAX_NEIGHBOURS
from service.errors import InvalidOption
from service.inference import neighbours
from service.inference.annotate import UNKNOWN, best_classes
from service.inference.embed import is_empty
from service.inference.model import Model
from service.inference.task import Options, Task

DEFAULT_K = 15
UNLABELLED = "Unlabelled"
"""Of a reference cell that has no label of a level."""


class MapOptions(Options):
    """How many neighbours are given."""

    k: int = Field(
        DEFAULT_K,
        gt=0,
        le=MAX_NEIGHBOURS,
        description=f"Reference cells to give for each cell, nearest first; {DEFAULT_K} by default, or all where the reference has fewer.",
    )

    def check(self, model: Model) -> None:
        """Refuse more neighbours than there are reference cells."""
        assert model.reference is not None, "offered only with a reference"
        if "k" in self.model_fields_set and self.k > len(model.reference):
            raise InvalidOption(name="k", problem=f"{model.id} carries {len(model.reference):,} reference cells.")

    def about(self, model: Model) -> dict[str, Any]:
        """What was searched, and which of classifier and vote did better by label level."""
        reference = model.manifest.reference
        assert reference is not None
        about: dict[str, Any] = {
            "n_cells": reference.n_cells,
            "n_training_cells": reference.n_training_cells,
            "metric": reference.metric,
        }
        if reference.vote is not None:
            about["vote"] = reference.vote.model_dump()
        return {"reference": about}


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
    """The nearest reference cells, their labels and votes beside the classifier's labels, and coordinates in the reference's UMAP."""
    assert isinstance(options, MapOptions)
    reference, how = model.reference, model.manifest.reference
    assert reference is not None
    assert how is not None
    empty = is_empty(counts)
    latent = model.encode(counts)
    k = min(options.k, len(reference))
    positions, distances = reference.search(latent, max(k, how.vote.n_neighbours if how.vote else 0))
    columns: dict[str, Column] = {
        "neighbours": LabelLists(np.ascontiguousarray(positions[:, :k]), reference.cells.cell_ids),
        "neighbour_distances": Vectors(distances[:, :k].astype(np.float32)),
    }
    if how.vote is not None:
        levels = [level for level in model.manifest.labels if level.name in how.vote.answers]
        n_classes = {level.name: len(level.classes) for level in levels}
        votes = neighbours.shares(how.vote, reference.cells.labels, n_classes, positions, distances)
        all_levels = model.manifest.labels
        classified = best_classes(all_levels, model.classify(counts, latent)) if "classify" in model.sessions else {}
        for level in levels:
            suffix = "" if level is model.manifest.labels[0] else f"_{level.name}"
            of_neighbours = reference.cells.labels[level.name][positions[:, :k]]
            found = _labels(level, of_neighbours, votes[level.name], classified.get(level.name), empty.values)
            columns |= {f"{name}{suffix}": column for name, column in found.items()}
    if "project" in model.sessions:
        columns["umap"] = Vectors(model.project(latent), ("umap_1", "umap_2"))
    return {**columns, "is_empty": empty}


def _labels(
    level: LabelLevel,
    of_neighbours: NDArray[np.int32],
    votes: NDArray[np.float32],
    classified: NDArray[np.int64] | None,
    empty: NDArray[np.generic],
) -> dict[str, Column]:
    n = len(level.classes)
    share = votes.max(axis=1, initial=0)
    unknown = np.asarray(empty, dtype=np.bool_) | (share == 0)
    voted = np.where(unknown, n, votes.argmax(axis=1)).astype(np.int32)
    columns: dict[str, Column] = {
        # The code of no label is -1, and must not mean the last class.
        "neighbour_labels": LabelLists(
            np.where(of_neighbours < 0, n, of_neighbours).astype(np.int32), (*level.classes, UNLABELLED)
        ),
        "voted_labels": Labels(voted, (*level.classes, UNKNOWN)),
        "vote_share": Values(np.where(unknown, np.float32(0), share)),
    }
    if classified is not None:
        best = np.where(empty, n, classified).astype(np.int32)
        columns["classified_labels"] = Labels(best, (*level.classes, UNKNOWN))
        columns["is_disagreeing"] = Values(np.asarray((best != voted) & ~unknown))
    return columns


TASK = Task(
    name="map",
    summary="The reference cells that lie nearest to the cells, and what these say",
    description=(
        "`neighbours`: ids of the `k` nearest reference cells, nearest first; GET /v1/models/{name}/reference has them all.\n\n"
        "`neighbour_distances`: Euclidean, in latent space.\n\n"
        "`neighbour_labels`: their labels, `Unlabelled` where a reference cell has none.\n\n"
        "`voted_labels`, `vote_share`: the label with most votes of the neighbours, and its share of them; how many vote and with which "
        "weight stands in the manifest, whatever `k` is. `Unknown` for a cell without a count, or of which no neighbour has a label.\n\n"
        "`classified_labels`, `is_disagreeing`: the classifier's most probable class, and whether it is another one: look at such cells.\n\n"
        "`umap`: coordinates on the reference's fixed picture, where the artifact has the graph project.\n\n"
        "`is_empty`: true for a cell without a single count in the model's genes; where it lies means nothing.\n\n"
        "Further label levels follow as `neighbour_labels_<level>` and so on."
    ),
    graphs=("encode",),
    run=run,
    options=MapOptions,
    needs_reference=True,
)
