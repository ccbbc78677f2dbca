"""How far cells of the reference move when genes are taken away from them: for a gene list that lacks just those."""

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.columns import Columns, Values, Vectors
from service.inference.model import Model
from service.inference.task import Options, Task


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:  # noqa: ARG001 - a task's signature
    """`latent`, and `best_class` of the first label level by number, as float32; -1 for a model without labels."""
    best = np.full(counts.shape[0], -1, dtype=np.float32)
    if model.manifest.labels:
        best = model.classify(counts)[model.manifest.labels[0].name].argmax(axis=1).astype(np.float32)
    return {"latent": Vectors(model.encode(counts)), "best_class": Values(best)}


def pairs(cells: sp.csr_matrix, missing: NDArray[np.int64]) -> sp.csr_matrix:
    """Cells as they are, and below them the same without the `missing` genes; shape (2 n_cells, n_genes)."""
    is_there = np.ones(cells.shape[1], dtype=np.float32)
    is_there[missing] = 0
    return sp.csr_matrix(sp.vstack([cells, cells.multiply(is_there)]))


def effect(columns: Columns, neighbour_distance: float) -> dict[str, Any]:
    """What `run` says of `pairs`: displacements in distances between neighbours, and the share of cells whose label changes."""
    latent, best = columns["latent"], columns["best_class"]
    assert isinstance(latent, Vectors)
    assert isinstance(best, Values)
    n_cells = len(latent.values) // 2
    moved = (
        np.linalg.norm(latent.values[:n_cells].astype(np.float64) - latent.values[n_cells:], axis=1)
        / neighbour_distance
    )
    changes = best.values[:n_cells] != best.values[n_cells:]
    return {
        "n_cells": n_cells,
        "displacement_median": float(np.median(moved)),
        "displacement_90": float(np.quantile(moved, 0.9)),
        "label_changes": float(changes.mean()) if (best.values >= 0).all() else None,
    }


def measure(model: Model, missing: NDArray[np.int64]) -> dict[str, Any] | None:
    """`effect` of the golden cells without those genes; None where the artifact has no unit for it."""
    measured = model.manifest.missing_genes
    if measured is None or not model.golden_counts.shape[0]:
        return None
    return effect(run(model, pairs(model.golden_counts, missing), Options()), measured.neighbour_distance)


TASK = Task(
    name="displacement",
    summary="Latent and most probable class of cells of the reference without some genes",
    description="Has no route of its own: POST /v1/genes/check asks it.",
    graphs=("encode",),
    run=run,
)
