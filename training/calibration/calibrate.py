"""Calibrate a run: probabilities, prediction sets and the recognition of unknown cells, all on cells that no gradient came from.

Either they were set apart from the run, or each cell of it is judged by a network that is trained without its fold (folds.py).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract.annotation import Conformal, LabelLevel, LevelCalibration
from training.calibration import folds, sets, unknown
from training.calibration import probabilities as fitting
from training.calibration.folds import CalibrationCells
from training.calibration.probabilities import METHODS, Map
from training.calibration.scores import over_rows, quantiles_of
from training.calibration.stored import Calibration, StoredScore
from training.data.minibatches import Cells
from training.data.prepared import encode_obs
from training.data.splits import CALIBRATION
from training.evaluation.cells import read
from training.run import Run

SHARE_OF_EPOCHS = 0.5
MIN_CELLS = 10
"""Labelled cells that a level needs."""

N_SURE = 8_192
"""Cells, at most, that tell how sure a network is."""

Array = NDArray[np.float64]


class CannotCalibrate(Exception):
    """A run has no classifier of labels, too few cells to calibrate it on, or cannot be trained without a fold."""


def calibrate(
    run: Run,
    share_of_epochs: float = SHARE_OF_EPOCHS,
    finds_unknown: bool = True,
    show: Callable[[str], object] = str,
    n_folds: int | None = None,
) -> Calibration:
    """Everything that `export` adds to a calibrated artifact. Test cells are never looked at.

    Args:
        run: finished, with labels.
        share_of_epochs: of the configuration's, for the networks that are trained without one class.
        finds_unknown: whether those networks are trained at all; without them there is no mapping score.
        show: told what is being done.
        n_folds: calibrate on all training and validation cells, each judged by a network that is trained without its fold; 2 or more. None:
            on the cells that were set apart from the run.

    Raises:
        CannotCalibrate: it has no labels or no classifier, or too few calibration cells with a label, or cannot be trained without a fold.
    """
    graphs = run.family.eval().graphs()
    levels = run.config.label_levels
    if not levels or "classify" not in graphs:
        raise CannotCalibrate(f"{run.config.name} has no classifier of labels, so that there is nothing to calibrate.")
    given = folds.set_apart(run) if n_folds is None else _divide(run, n_folds)
    _, labels = encode_obs(run.config, run.reference[given.positions], run.prepared.batches)
    n_labelled = int((labels[:, 0] >= 0).sum())
    if n_labelled < MIN_CELLS * (n_folds or 1):
        mend = "Raise split.validation or split.calibration, or calibrate on all cells of the run with --folds 5."
        raise CannotCalibrate(
            f"{n_labelled} {given.cells} cells of {run.config.name} have a label of '{levels[0].name}'; at least {MIN_CELLS} are needed"
            + (f". {mend}" if n_folds is None else f" in each of {n_folds} folds. Take fewer folds.")
        )
    detection = unknown.choose(given, share_of_epochs, show) if finds_unknown else None
    show(f"probabilities of {len(given.positions):,} {given.cells} cells")
    raw, score = _judge(given, labels, detection.score if detection else None, show)
    maps, about, without = _probabilities(given, raw, labels)
    # By the very maps that are served, and not by those without each part: with few cells these differ in scale, and where most probabilities
    # are near one, a quantile of scores by many maps is none of scores by one.
    served = fitting.compose(levels, _conditional(levels, raw, maps))
    sizes, scores, n_cells = [], {}, {}
    for i, level in enumerate(levels):
        if level.name in about:
            by_part = {number: found[level.name] for number, found in without.items()}
            sizes += sets.sizes(level.name, by_part, labels[:, i], given.fold)
            found = sets.true_scores(served[level.name], labels[:, i])
            scores |= {f"{level.name}/{name}": array for name, array in found.items()}
            n_cells[level.name] = len(found["scores"])
    return Calibration(
        maps=maps,
        levels=about,
        conformal=Conformal(min_class=sets.MIN_CLASS, n_cells=n_cells, sizes=tuple(sizes)),
        scores=scores,
        unknown=detection,
        score=score,
    )


def _divide(run: Run, n_folds: int) -> CalibrationCells:
    """All cells of the run in folds.

    Raises:
        CannotCalibrate: cells were set apart for it already, or the run began with weights that may know the cells of every fold.
    """
    if CALIBRATION in run.split.part.values():
        raise CannotCalibrate(
            f"{run.config.name} has cells that were set apart for calibration, which folds would leave unused. Calibrate without --folds, or "
            "fit it with split.calibration: 0."
        )
    if run.config.start is not None:
        raise CannotCalibrate(
            f"{run.config.name} began with the weights of {run.config.start.run}, and networks without a fold would not. Calibrate without "
            "--folds, on validation cells or with split.calibration."
        )
    return folds.divide(run, n_folds)


def _judge(
    given: CalibrationCells, labels: NDArray[np.int64], score: str | None, show: Callable[[str], object]
) -> tuple[dict[str, Array], StoredScore | None]:
    """What networks say of the cells that they never met: their own probabilities, (n_cells, n_classes) by level, and the mapping score.

    In folds each network's probabilities are made as sure as the run's. The score's quantiles are those of all cells, each judged by the
    network without its fold and that network's own fit of the score; the score that is served is fitted on the run.
    """
    run, n_cells = given.run, len(given.positions)
    raw = {level.name: np.empty((n_cells, len(level.classes))) for level in run.config.label_levels}
    known, arrays = np.empty(n_cells, np.float32), {}
    for network, places in given.networks(show):
        cells = read(network, given.positions[places])
        for name, found in network_probabilities(network, cells).items():
            raw[name][places] = found
        if given.n_folds is not None:
            _make_as_sure(given, network, places, labels, raw)
        if score is not None:
            arrays = unknown.fit_score(network, score)
            known[places] = unknown.values(network.family.eval().graphs(), score, arrays, cells.counts)
    if score is None:
        return raw, None
    if given.n_folds is not None:
        arrays = unknown.fit_score(run, score)
    return raw, StoredScore(score, arrays, quantiles_of(known))


def _make_as_sure(
    given: CalibrationCells, network: Run, places: NDArray[np.int64], labels: NDArray[np.int64], raw: dict[str, Array]
) -> None:
    """Scale the logits of what a fold's network said, so that it is as sure of cells that both have met as the run is.

    Networks of one configuration differ in how far they go on raising the probabilities of cells that they have long learned. Where most
    of these are near one, a limit for 80 % of cells lies among them, and would hold for the networks of the folds and not for the run's.
    """
    met = np.setdiff1d(np.arange(len(given.positions)), places)
    met = met[:: -(-len(met) // N_SURE)]
    group = fitting.groups(given.run.config.label_levels)
    run_says, network_says = (
        network_probabilities(one, read(one, given.positions[met])) for one in (given.run, network)
    )
    for i, (name, values) in enumerate(raw.items()):
        sure, is_now = (
            fitting.sureness(found[name], labels[met, i], group[name]) for found in (run_says, network_says)
        )
        if sure > 0 and is_now > 0:
            scaling = Map.scale(values.shape[1], sure / is_now)
            values[places] = fitting.apply_map(scaling, values[places], group[name])


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
    given: CalibrationCells, raw: dict[str, Array], labels: NDArray[np.int64]
) -> tuple[dict[str, Map], dict[str, LevelCalibration], dict[int, dict[str, Array]]]:
    """Maps, where one is better than none; what is said of them by cross-validation; and what all cells get by maps without each part.

    Levels with too few labelled cells have neither of the first two.
    """
    levels, parts = given.run.config.label_levels, [int(number) for number in np.unique(given.fold)]
    group = fitting.groups(levels)
    before = _conditional(levels, raw, {})
    after, maps, chosen, losses = dict(before), {}, {}, {}
    maps_without: dict[int, dict[str, Map]] = {number: {} for number in parts}
    for i, level in enumerate(levels):
        name, truth = level.name, labels[:, i]
        if int((truth >= 0).sum()) < MIN_CELLS:
            continue
        tried = {method: fitting.fit_without(method, raw[name], truth, group[name], given.fold) for method in METHODS}
        found = {method: fitting.cross_fitted(of, raw[name], group[name], given.fold) for method, of in tried.items()}
        losses[name] = {method: fitting.log_loss(values, truth) for method, values in found.items()}
        chosen[name] = min(METHODS, key=lambda method: losses[name][method])
        after[name] = found[chosen[name]]
        for number in parts:
            maps_without[number][name] = tried[chosen[name]][number]
        known = truth >= 0
        maps[name] = fitting.fit_map(chosen[name], raw[name][known], truth[known], group[name])
    network, final = fitting.compose(levels, before), fitting.compose(levels, after)
    without = {number: fitting.compose(levels, _conditional(levels, raw, maps_without[number])) for number in parts}
    about = {}
    for i, level in enumerate(levels):
        if level.name in maps:
            about[level.name] = LevelCalibration(
                method=chosen[level.name],
                parameters=_parameters(chosen[level.name], maps[level.name]),
                cells=given.cells,
                n_cells=int((labels[:, i] >= 0).sum()),
                n_folds=given.n_folds,
                candidates=losses[level.name],
                before=fitting.reliability(network[level.name], labels[:, i]),
                after=fitting.reliability(final[level.name], labels[:, i]),
            )
    return {name: one for name, one in maps.items() if chosen[name] != "none"}, about, without


def _conditional(levels: Sequence[LabelLevel], raw: dict[str, Array], maps: Mapping[str, Map]) -> dict[str, Array]:
    """Probabilities within their parents, by level; of a level without a map as they are."""
    group = fitting.groups(levels)
    return {
        level.name: fitting.apply_map(
            maps.get(level.name, Map.identity(len(level.classes))), raw[level.name], group[level.name]
        )
        for level in levels
    }


def _parameters(method: str, found: Map) -> dict[str, tuple[float, ...]]:
    """The map in the fewest numbers, as the manifest holds it."""
    if method == "none":
        return {}
    if method == "temperature":
        return {"weight": (float(found.weight[0, 0]),)}
    weight = np.diag(found.weight) if method == "vector" else found.weight.ravel()
    return {"weight": tuple(map(float, weight)), "bias": tuple(map(float, found.bias))}
