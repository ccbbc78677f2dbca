"""explain: which genes of a cell make its label, a latent unit or a direction what it is."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import Field

from service.cells.columns import Column, Columns, LabelLists, Labels, Values, Vectors
from service.contract.annotation import LabelLevel
from service.errors import InvalidOption
from service.inference.annotate import best_classes
from service.inference.embed import is_empty
from service.inference.model import Model
from service.inference.task import Options, Task

INTEGRATED: Final = "integrated_gradients"
MAX_TOP, MAX_STEPS = 1000, 256
_COMPLETE, _DOUBLINGS = 0.01, 4
"""Completeness error at which a cell is done, and how often the steps are doubled for those that are not."""

_FLOOR = 1e-6


class ExplainOptions(Options):
    """What is explained, against what, and how."""

    label: str | None = Field(
        None,
        description="Class whose log-odds against all other classes are explained. By default each cell's own most probable class; for a "
        "model without classes the latent unit 0.",
    )
    level: str | None = Field(None, description="Label level of `label`; by default the first.")
    unit: int | None = Field(None, ge=0, description="Latent unit that is explained, from 0.")
    direction: str | None = Field(
        None,
        max_length=20_000,
        description="Direction in latent space that is explained: comma-separated numbers, one per latent unit. The difference of two "
        "groups' mean latents explains what tells them apart; the client's `direction_between` makes it.",
    )
    method: Literal["integrated_gradients", "input_x_gradient"] = Field(
        INTEGRATED,
        description="`integrated_gradients`: gradients averaged along the straight path from the baseline to the cell, whose sum is what "
        "the cell differs by from the baseline. `input_x_gradient`: the gradient at the cell alone, `steps` times as fast.",
    )
    baseline: Literal["empty", "mean"] = Field(
        "empty",
        description="`empty`: a cell without counts, so that only genes that a cell has can speak. `mean`: the mean of the reference's "
        "cells, so that genes that are missing speak, too.",
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = Field(
        32,
        description="Places on the path at which integrated gradients are taken, 1 to 256. A cell whose attributions do not add up within 1 % "
        "is taken again with twice as many, up to 16 times.",
    )
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] | Literal["all"] = Field(
        20, description="Genes to give per cell, those with the largest attributions by size, or `all`."
    )

    def check(self, model: Model) -> None:
        """Refuse labels, units and directions that the model does not have."""
        given = [name for name in ("label", "unit", "direction") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidOption(name=given[1], problem=f"'{given[0]}' is given, too, and one thing can be explained.")
        manifest = model.manifest
        if self.level is not None or self.label is not None:
            levels = [level.name for level in manifest.labels]
            if given and given[0] != "label":
                raise InvalidOption(name="level", problem=f"it belongs to a label, and '{given[0]}' is asked for.")
            if not levels:
                raise InvalidOption(name="label", problem=f"{manifest.id} has no classes.")
            if self.level is not None and self.level not in levels:
                raise InvalidOption(name="level", problem=f"'{self.level[:40]}' is not one of: {', '.join(levels)}.")
            classes = _level(model, self.level).classes
            if self.label is not None and self.label not in classes:
                raise InvalidOption(
                    name="label", problem=f"'{self.label[:60]}' is not one of: {', '.join(classes[:100])}."
                )
        if self.unit is not None and self.unit >= manifest.n_latent:
            raise InvalidOption(
                name="unit",
                problem=f"{self.unit} is not one of 0 to {manifest.n_latent - 1}, the units of {manifest.id}.",
            )
        if self.direction is not None:
            self.components(manifest.n_latent)

    def components(self, n_latent: int) -> NDArray[np.float32]:
        """The direction, (n_latent,).

        Raises:
            InvalidOption: it is not that many numbers, or all of them are zero.
        """
        assert self.direction is not None
        try:
            values = [float(text) for text in self.direction.split(",")]
        except ValueError:
            raise InvalidOption(name="direction", problem="it must be numbers separated by commas.") from None
        if len(values) != n_latent or not all(abs(value) < 1e30 for value in values) or not any(values):
            raise InvalidOption(
                name="direction",
                problem=f"it must be {n_latent} finite numbers, not all of them zero; there are {len(values)}.",
            )
        return np.array(values, dtype=np.float32)

    def about(self, model: Model) -> dict[str, Any]:
        """What the numbers are of."""
        about: dict[str, Any] = {"method": self.method, "baseline": self.baseline}
        if self.method == INTEGRATED:
            about["steps"] = self.steps
        if self.direction is not None:
            about |= {"explained": "direction", "unit_of_value": "latent"}
        elif self.unit is not None or not model.manifest.labels:
            about |= {"explained": f"unit {self.unit or 0}", "unit_of_value": "latent"}
        else:
            level = _level(model, self.level)
            about |= {"explained": self.label or "predicted label", "level": level.name, "unit_of_value": "log-odds"}
        return {"explanation": about}


def _level(model: Model, name: str | None) -> LabelLevel:
    levels = model.manifest.labels
    return levels[0] if name is None else next(level for level in levels if level.name == name)


def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
    """Attributions in what is explained (log-odds, or units of the latent), and how well they add up."""
    assert isinstance(options, ExplainOptions)
    direction, explained = _directions(model, counts, options)
    n_cells = counts.shape[0]
    baseline = np.full(n_cells, options.baseline == "mean", dtype=np.float32)
    path = _Path(model, counts, direction, baseline)
    gradient, value = path.at(1.0)
    _, start = path.at(0.0)
    change = value.astype(np.float64) - start
    if options.method == INTEGRATED:
        attribution, error, n_steps = _integrate(path, change, options.steps)
    else:
        attribution, error, n_steps = gradient, _incompleteness(gradient, change), np.ones(n_cells)
    columns: dict[str, Column] = {} if explained is None else {"explained": explained}
    columns |= _genes(model, attribution, options.top)
    return {
        **columns,
        "value": Values(value),
        "baseline_value": Values(start),
        "completeness_error": Values(error.astype(np.float32)),
        "n_steps": Values(n_steps.astype(np.float32)),
        "is_empty": is_empty(counts),
    }


@dataclass(frozen=True)
class _Path:
    """The straight paths from a baseline to some cells, and what is explained of them."""

    model: Model
    counts: sp.csr_matrix
    direction: NDArray[np.float32]
    baseline: NDArray[np.float32]

    def at(self, position: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Input times gradient (n_cells, n_genes) and value (n_cells,) at a place between 0 and 1."""
        places = np.full(self.counts.shape[0], position, dtype=np.float32)
        return self.model.explain(self.counts, self.direction, places, self.baseline)

    def of(self, cells: NDArray[np.int64]) -> "_Path":
        """The paths of some of the cells."""
        return _Path(self.model, self.counts[cells], self.direction[cells], self.baseline[cells])


def _integrate(
    path: _Path, change: NDArray[np.float64], n_steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Integrated gradients, their completeness errors, and the steps that each cell was given.

    Cells that do not add up get twice as many steps, again and again: which ones follows from each cell alone.
    """
    n_cells, n_genes = path.counts.shape
    attribution = np.empty((n_cells, n_genes), dtype=np.float32)
    error, used = np.empty(n_cells), np.empty(n_cells)
    left = np.arange(n_cells)
    for doubling in range(_DOUBLINGS + 1):
        found = _average(path.of(left), n_steps << doubling)
        attribution[left], used[left] = found, n_steps << doubling
        error[left] = _incompleteness(found, change[left])
        left = left[error[left] > _COMPLETE]
        if not len(left):
            break
    return attribution, error, used


def _average(path: _Path, n_steps: int) -> NDArray[np.float32]:
    """Mean of input times gradient over the path, (n_cells, n_genes), by the midpoints of steps that grow with the square of their number.

    Normalised layers turn fastest near the baseline, where steps are therefore short.
    """
    ends = [(i / n_steps) ** 2 for i in range(n_steps + 1)]
    total = np.zeros(path.counts.shape, dtype=np.float64)
    # One place after the other, so that a cell's sum has one order whatever its company.
    for first, last in pairwise(ends):
        total += (last - first) * path.at((first + last) / 2)[0]
    return total.astype(np.float32)


def _incompleteness(attribution: NDArray[np.float32], change: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the sum of each cell's attributions is from the change that they explain, as a share, (n_cells,).

    Of the change, or of a tenth of all attributions' sizes where that is more: genes for and against may add up to nearly nothing.
    """
    size = np.maximum(np.abs(change), 0.1 * np.abs(attribution).sum(axis=1, dtype=np.float64))
    error: NDArray[np.float64] = np.abs(attribution.sum(axis=1, dtype=np.float64) - change) / np.maximum(size, _FLOOR)
    return error


def _directions(
    model: Model, counts: sp.csr_matrix, options: ExplainOptions
) -> tuple[NDArray[np.float32], Labels | None]:
    """Weights of latent units and log-odds, (n_cells, n_latent + n_classes), and the label that each cell is explained for."""
    manifest, n_cells = model.manifest, counts.shape[0]
    n_latent = manifest.n_latent
    direction = np.zeros((n_cells, n_latent + sum(len(level.classes) for level in manifest.labels)), dtype=np.float32)
    if options.direction is not None:
        direction[:, :n_latent] = options.components(n_latent)
        return direction, None
    if options.unit is not None or not manifest.labels:
        direction[:, options.unit or 0] = 1
        return direction, None
    level = _level(model, options.level)
    codes = (
        best_classes(manifest.labels, model.classify(counts))[level.name]
        if options.label is None
        else np.full(n_cells, level.classes.index(options.label))
    )
    first = n_latent + sum(len(other.classes) for other in manifest.labels[: manifest.labels.index(level)])
    direction[np.arange(n_cells), first + codes] = 1
    return direction, Labels(codes.astype(np.int32), level.classes)


def _genes(model: Model, attribution: NDArray[np.float32], top: int | Literal["all"]) -> dict[str, Column]:
    names = model.genes.displays
    if top == "all":
        return {"attribution": Vectors(attribution, names)}
    # Stable, so that genes of one size come in the model's order.
    order = np.argsort(-np.abs(attribution), axis=1, kind="stable")[:, :top]
    return {
        "top_genes": LabelLists(order.astype(np.int32), names),
        "top_attributions": Vectors(np.take_along_axis(attribution, order, axis=1)),
    }


TASK = Task(
    name="explain",
    summary="Which genes of the cells speak for a label, a latent unit or a direction",
    description=(
        "`top_genes`: names of the genes with the largest attributions, by size.\n\n"
        "`top_attributions`: what each of them adds: to the log-odds of the label (natural logarithm), or to the latent unit or direction. "
        "Negative speaks against it.\n\n"
        "`attribution`: in place of both where `top` is `all`: that of every gene, named.\n\n"
        "`explained`: the label that a cell is explained for.\n\n"
        "`value`, `baseline_value`: the log-odds, unit or direction of the cell, and of the baseline.\n\n"
        "`completeness_error`: how far the sum of all attributions is from the difference of the two, as a share of it (or of a tenth of "
        "the sum of their sizes, where that is more). Integrated gradients are refined until it is below 0.01, as far as `steps` goes.\n\n"
        "`n_steps`: gradients that the cell's attributions are the mean of.\n\n"
        "`is_empty`: true for a cell without a single count in the model's genes; nothing of it can be explained."
    ),
    graphs=("encode", "explain"),
    run=run,
    options=ExplainOptions,
)
