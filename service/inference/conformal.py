"""Split conformal prediction: sets of classes that hold the true one as often as was asked for (Vovk 2005; Sadinle et al. 2019)."""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.contract.artifact import Artifact
from service.errors import InvalidArtifact


@dataclass(frozen=True)
class LevelScores:
    """Calibration cells of a label level."""

    by_class: tuple[NDArray[np.float64], ...]
    """For each class the sorted scores that its quantile is taken of: those of its own cells, or of all where it has few."""

    def limits(self, coverage: float) -> NDArray[np.float64]:
        """Largest score with which a class is in the set, (n_classes,): the ⌈(n + 1) coverage⌉-th, without bound where there is none."""
        return np.array([_quantile(scores, coverage) for scores in self.by_class])


@dataclass(frozen=True)
class PredictionSets:
    """The calibration scores of a model, by label level."""

    levels: Mapping[str, LevelScores]

    def codes(self, level: str, probabilities: NDArray[np.float32], coverage: float) -> NDArray[np.int32]:
        """The set of each cell, the most probable class first.

        Args:
            level: name of the label level.
            probabilities: (n_cells, n_classes).
            coverage: share of cells whose set is to hold the true class.

        Returns:
            Codes of classes, int32 (n_cells, n_classes), -1 after the last; a set may be empty.
        """
        is_in = others(probabilities) <= self.levels[level].limits(coverage)
        order = np.argsort(-probabilities, axis=1, kind="stable")
        kept = np.take_along_axis(is_in, order, axis=1)
        # Members move to the front and keep their order.
        front = np.argsort(~kept, axis=1, kind="stable")
        codes = np.take_along_axis(np.where(kept, order, -1), front, axis=1)
        return codes.astype(np.int32)


def others(probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    """Probability of all other classes, float64 of the same shape (n_cells, n_classes).

    It is summed and not taken from 1, since a probability near 1 has no digits left for what it lacks.
    """
    padded = np.pad(np.asarray(probabilities, dtype=np.float64), ((0, 0), (1, 1)))
    before, after = np.cumsum(padded, axis=1), np.cumsum(padded[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(before[:, :-2] + after[:, 2:])


def group_scores(
    scores: NDArray[np.float64], classes: NDArray[np.int32], n_classes: int, min_class: int
) -> LevelScores:
    """What quantiles are taken of.

    Args:
        scores: of the true class of each calibration cell, (n_cells,).
        classes: the true class, (n_cells,).
        n_classes: of the level.
        min_class: cells that a class needs for a quantile of its own.
    """
    everything = np.sort(scores)
    own = [np.sort(scores[classes == code]) for code in range(n_classes)]
    return LevelScores(tuple(some if len(some) >= min_class else everything for some in own))


def _quantile(scores: NDArray[np.float64], coverage: float) -> float:
    # A hair less, since 10 * 0.9 is not always 9.
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return math.inf if rank > len(scores) else float(scores[max(rank, 1) - 1])


def read_sets(artifact: Artifact) -> PredictionSets | None:
    """The calibration scores of an artifact; None where it has none.

    Raises:
        InvalidArtifact: the file does not hold what the manifest says.
    """
    about = artifact.manifest.conformal
    if about is None:
        return None
    path = str(artifact.path / about.file)
    try:
        with np.load(io.BytesIO(artifact.contents[about.file]), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InvalidArtifact(path=path, problem=f"not a readable npz file ({error})") from None
    levels = {}
    for level in artifact.manifest.labels:
        if level.name not in about.n_cells:
            continue
        scores, classes = arrays.get(f"{level.name}/scores"), arrays.get(f"{level.name}/classes")
        shape = (about.n_cells[level.name],)
        if scores is None or classes is None or scores.shape != shape or classes.shape != shape:
            raise InvalidArtifact(
                path=path, problem=f"it lacks scores and classes of {shape[0]} cells for level '{level.name}'"
            )
        if scores.dtype != np.float64 or classes.dtype != np.int32 or not np.isfinite(scores).all():
            raise InvalidArtifact(
                path=path, problem=f"level '{level.name}' must have finite float64 scores and int32 classes"
            )
        if len(classes) and not 0 <= classes.min() <= classes.max() < len(level.classes):
            raise InvalidArtifact(
                path=path, problem=f"level '{level.name}' has a class that the manifest does not have"
            )
        levels[level.name] = group_scores(scores, classes, len(level.classes), about.min_class)
    return PredictionSets(levels)
