"""Calibrate a run: probabilities, prediction sets and the recognition of unknown cells, all on cells that no gradient came from."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from service.contract.annotation import Conformal, LabelLevel, LevelCalibration
from training.calibration import probabilities as fitting
from training.calibration import sets, unknown
from training.calibration.probabilities import METHODS, Map
from training.calibration.scores import over_rows
from training.calibration.stored import Calibration
from training.data.minibatches import Cells
from training.data.splits import CALIBRATION, VALIDATION
from training.evaluation.cells import read
from training.run import Run

SHARE_OF_EPOCHS = 0.5
MIN_CELLS = 10
"""Labelled cells that a level needs."""

Array = NDArray[np.float64]


class CannotCalibrate(Exception):
    """A run has no classifier of labels, or too few cells to calibrate it on."""


def calibrate(
    run: Run, share_of_epochs: float = SHARE_OF_EPOCHS, finds_unknown: bool = True, show: Callable[[str], object] = str
) -> Calibration:
    """Everything that `export` adds to a calibrated artifact. Test cells are never looked at.

    Args:
        run: finished, with labels.
        share_of_epochs: of the configuration's, for the networks that are trained without one class.
        finds_unknown: whether those networks are trained at all; without them there is no mapping score.
        show: told what is being done.

    Raises:
        CannotCalibrate: it has no labels or no classifier, or too few calibration cells with a label.
    """
    graphs = run.family.eval().graphs()
    levels = run.config.label_levels
    if not levels or "classify" not in graphs:
        raise CannotCalibrate(f"{run.config.name} has no classifier of labels, so that there is nothing to calibrate.")
    part = CALIBRATION if CALIBRATION in run.split.part.values() else VALIDATION
    cells = read(run, run.split.positions(run.reference, part))
    n_labelled = int((cells.labels[:, 0] >= 0).sum())
    if n_labelled < MIN_CELLS:
        raise CannotCalibrate(
            f"{n_labelled} {part} cells of {run.config.name} have a label of '{levels[0].name}'; at least {MIN_CELLS} are needed. Raise "
            "split.validation or split.calibration."
        )
    show(f"probabilities on {len(cells):,} {part} cells")
    raw = network_probabilities(run, cells)
    fold = fitting.folds(cells.labels[:, 0], run.config.seed)
    maps, about, final = _probabilities(levels, raw, cells.labels, fold, part)
    sizes, scores, n_cells = [], {}, {}
    for i, level in enumerate(levels):
        if level.name in about:
            sizes += sets.sizes(level.name, final[level.name], cells.labels[:, i], fold)
            found = sets.true_scores(final[level.name], cells.labels[:, i])
            scores |= {f"{level.name}/{name}": array for name, array in found.items()}
            n_cells[level.name] = len(found["scores"])
    detection = unknown.learn(run, part, share_of_epochs, show) if finds_unknown else None
    return Calibration(
        maps=maps,
        levels=about,
        conformal=Conformal(min_class=sets.MIN_CLASS, n_cells=n_cells, sizes=tuple(sizes)),
        scores=scores,
        unknown=detection[0] if detection else None,
        score=detection[1] if detection else None,
    )


def network_probabilities(run: Run, cells: Cells) -> dict[str, Array]:
    """What the network itself says, (n_cells, n_classes) by level."""
    graphs = run.family.eval().graphs()
    classify = graphs["classify"]
    known = {"counts": cells.counts, "latent": over_rows(graphs["encode"].module, (cells.counts,))}
    given = tuple(known[name] for name in classify.inputs)
    return {
        level.name: over_rows(classify.module, given, output=i).astype(np.float64)
        for i, level in enumerate(run.config.label_levels)
    }


def _probabilities(
    levels: tuple[LabelLevel, ...], raw: dict[str, Array], labels: NDArray[np.int64], fold: NDArray[np.int64], part: str
) -> tuple[dict[str, Map], dict[str, LevelCalibration], dict[str, Array]]:
    """Maps, what is said of them, and cross-validated probabilities, by level; levels with too few labelled cells have no map."""
    group = fitting.groups(levels)
    before = {
        level.name: fitting.apply_map(Map.identity(len(level.classes)), raw[level.name], group[level.name])
        for level in levels
    }
    conditional, maps, chosen, losses = dict(before), {}, {}, {}
    for i, level in enumerate(levels):
        name, truth = level.name, labels[:, i]
        if int((truth >= 0).sum()) < MIN_CELLS:
            continue
        tried = {method: fitting.cross_fit(method, raw[name], truth, group[name], fold) for method in METHODS}
        losses[name] = {method: fitting.log_loss(found, truth) for method, found in tried.items()}
        chosen[name] = min(METHODS, key=lambda method: losses[name][method])
        conditional[name] = tried[chosen[name]]
        known = truth >= 0
        maps[name] = fitting.fit_map(chosen[name], raw[name][known], truth[known], group[name])
    network, final = fitting.compose(levels, before), fitting.compose(levels, conditional)
    about = {}
    for i, level in enumerate(levels):
        if level.name in maps:
            about[level.name] = LevelCalibration(
                method=chosen[level.name],
                parameters=_parameters(chosen[level.name], maps[level.name]),
                cells=part,
                n_cells=int((labels[:, i] >= 0).sum()),
                candidates=losses[level.name],
                before=fitting.reliability(network[level.name], labels[:, i]),
                after=fitting.reliability(final[level.name], labels[:, i]),
            )
    return {name: one for name, one in maps.items() if chosen[name] != "none"}, about, final


def _parameters(method: str, found: Map) -> dict[str, tuple[float, ...]]:
    """The map in the fewest numbers, as the manifest holds it."""
    if method == "none":
        return {}
    if method == "temperature":
        return {"weight": (float(found.weight[0, 0]),)}
    weight = np.diag(found.weight) if method == "vector" else found.weight.ravel()
    return {"weight": tuple(map(float, weight)), "bias": tuple(map(float, found.bias))}
