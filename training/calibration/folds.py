"""The cells that a run is calibrated on, with networks that never met them: a part of the split, or all of the run's cells in folds.

Folds are what scikit-learn's `CalibratedClassifierCV(ensemble=False)` does: each cell is judged by a network that was trained on the other
folds, maps are fitted on these judgements of all cells, and what is served is the network that learned from all of them. Of prediction sets
it is cross-conformal prediction (Vovk 2015, doi:10.1007/s10472-013-9368-4) with that one network in place of the folds' own, which CV+
(Barber et al. 2021, doi:10.1214/20-AOS1965) would ask again. Their promises are for the folds' own networks and are not inherited: ours is
good as far as the network that is served, which has met a few cells more, judges new cells as those do.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import fit as fitting
from training.calibration import probabilities
from training.config import Config
from training.data.prepared import encode_obs, prepare
from training.data.splits import CALIBRATION, TRAIN, VALIDATION, Split
from training.run import Run


@dataclass(frozen=True)
class CalibrationCells:
    """Cells of a run, each of which some network never met."""

    run: Run
    cells: str
    """What they are called in the manifest and in messages."""

    positions: NDArray[np.int64]
    """In the run's reference, ascending."""

    fold: NDArray[np.int64]
    """(n_cells,). Figures of each fold come from maps and limits that were fitted without it."""

    n_folds: int | None
    """Networks that are trained, each without one fold; None where the run itself never met these cells."""

    def networks(self, show: Callable[[str], object] = str) -> Iterator[tuple[Run, NDArray[np.int64]]]:
        """Each network as a run, with the cells that it is to judge: their places in `positions`. It is gone when the next one is asked for."""
        if self.n_folds is None:
            yield self.run, np.arange(len(self.positions))
            return
        for number in range(self.n_folds):
            show(f"training without fold {number + 1} of {self.n_folds}")
            with tempfile.TemporaryDirectory() as scratch:
                yield self._fit_without(number, Path(scratch)), np.flatnonzero(self.fold == number)

    def trial(self, number: int) -> tuple[Split, NDArray[np.int64]]:
        """For the network that lacks the class of that number: what it may be trained on, and positions of cells that it then never met.

        One fold after the other is left out beside the classes, so that known cells of all of them are asked about.
        """
        if self.n_folds is None:
            return self.run.split, self.positions
        return self._without(number % self.n_folds), self.positions[self.fold == number % self.n_folds]

    def _without(self, number: int) -> Split:
        gone = set(self.run.reference.obs_names[self.positions[self.fold == number]])
        return Split({name: part for name, part in self.run.split.part.items() if name not in gone})

    def _fit_without(self, number: int, scratch: Path) -> Run:
        run, split = self.run, self._without(number)
        config = fold_config(run.config, number, len(self.positions) / int((self.fold != number).sum()))
        genes = run.reference.var_names.get_indexer(run.prepared.var.index)
        prepared = prepare(config, run.reference, split, scratch, genes)
        family = fitting.fit(config, prepared, scratch, show_progress=False).family.eval()
        return Run(config, run.reference, split, prepared, family, {})


def set_apart(run: Run) -> CalibrationCells:
    """The cells of the part `calibration`, or else those of `validation`."""
    part = CALIBRATION if CALIBRATION in run.split.part.values() else VALIDATION
    positions = run.split.positions(run.reference, part)
    _, labels = encode_obs(run.config, run.reference[positions], run.prepared.batches)
    return CalibrationCells(run, part, positions, probabilities.folds(labels[:, 0], run.config.seed), None)


def divide(run: Run, n_folds: int) -> CalibrationCells:
    """All training and validation cells in folds.

    Classes of each level are spread over the folds as evenly as their numbers allow, within them batches, and within those the parts of the
    split: a network without a fold is trained as the run was, with the validation cells of the other folds, where there are any.
    """
    positions = run.split.positions(run.reference, TRAIN, VALIDATION)
    batch, labels = encode_obs(run.config, run.reference[positions], run.prepared.batches)
    is_validation = np.isin(positions, run.split.positions(run.reference, VALIDATION))
    _, stratum = np.unique(np.column_stack([labels, batch, is_validation]), axis=0, return_inverse=True)
    cells = f"{TRAIN} and {VALIDATION}" if is_validation.any() else TRAIN
    return CalibrationCells(
        run, cells, positions, probabilities.folds(stratum.ravel(), run.config.seed, n_folds), n_folds
    )


def fold_config(config: Config, number: int, share: float) -> Config:
    """The configuration of the network without that fold: the run's, with weights, order and noise of its own, and nothing recorded.

    Args:
        config: of the run.
        number: of the fold.
        share: how many times more cells the run has. The network has so many times more epochs, and takes as many steps: with fewer it is
            less sure than the one that is served, and sets would hold the truth more often than was asked for.
    """
    seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0])
    fit = config.fit
    longer = {name: max(1, round(share * getattr(fit, name))) for name in ("max_epochs", "patience")}
    return config.model_copy(update={"seed": seed, "fit": fit.model_copy(update={"loggers": (), **longer})})
