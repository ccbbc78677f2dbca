"""What `calibrate` leaves in a run directory, for `export` to put into the artifact."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.annotation import Conformal, LevelCalibration, UnknownDetection
from training import archive
from training.calibration.probabilities import Map
from training.calibration.scores import SCORES, Score
from training.families.family import Graph

FIGURES, ARRAYS = "calibration.json", "calibration.npz"


class StaleCalibration(Exception):
    """A run was calibrated with other weights than it now has."""


@dataclass(frozen=True)
class StoredScore:
    """A mapping score that was fitted."""

    name: str
    arrays: dict[str, NDArray[np.float32]]
    quantiles: NDArray[np.float32]

    def build(self, graphs: Mapping[str, Graph]) -> Score:
        """The module."""
        return SCORES[self.name].build(graphs, self.arrays)


@dataclass(frozen=True)
class Calibration:
    """Everything that calibrating a run gives."""

    maps: dict[str, Map]
    """By level."""

    levels: dict[str, LevelCalibration]
    conformal: Conformal | None = None
    scores: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Arrays of the conformal file."""

    unknown: UnknownDetection | None = None
    score: StoredScore | None = None


def write(directory: Path, weights: Path, found: Calibration) -> None:
    """Write into a run directory whose weights lie in `weights`."""
    arrays: dict[str, NDArray[Any]] = {}
    for level, one in found.maps.items():
        arrays |= {f"maps/{level}/weight": one.weight, f"maps/{level}/bias": one.bias}
    arrays |= {f"conformal/{name}": array for name, array in found.scores.items()}
    if found.score is not None:
        arrays |= {f"score/{name}": array for name, array in found.score.arrays.items()}
        arrays["quantiles"] = found.score.quantiles
    figures = {
        "weights": _digest(weights),
        "levels": {name: level.model_dump(mode="json") for name, level in found.levels.items()},
        "conformal": found.conformal.model_dump(mode="json") if found.conformal else None,
        "unknown": found.unknown.model_dump(mode="json") if found.unknown else None,
        "score": found.score.name if found.score else None,
    }
    (directory / ARRAYS).write_bytes(archive.dump(arrays))
    (directory / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")


def read(directory: Path, weights: Path) -> Calibration | None:
    """What `write` wrote; None for a run that was not calibrated.

    Raises:
        StaleCalibration: the weights have changed since.
    """
    if not (directory / FIGURES).is_file():
        return None
    figures = json.loads((directory / FIGURES).read_text())
    if figures["weights"] != _digest(weights):
        raise StaleCalibration(
            f"{directory} was calibrated with other weights. Run `python -m training calibrate {directory}` again."
        )
    with np.load(io.BytesIO((directory / ARRAYS).read_bytes()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    name = figures["score"]
    score = StoredScore(name, _below("score/", arrays), arrays["quantiles"]) if name else None
    return Calibration(
        maps={
            level: Map(arrays[f"maps/{level}/weight"], arrays[f"maps/{level}/bias"])
            for level in figures["levels"]
            if f"maps/{level}/weight" in arrays
        },
        levels={name: LevelCalibration.model_validate(level) for name, level in figures["levels"].items()},
        conformal=figures["conformal"] and Conformal.model_validate(figures["conformal"]),
        scores=_below("conformal/", arrays),
        unknown=figures["unknown"] and UnknownDetection.model_validate(figures["unknown"]),
        score=score,
    )


def _below(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
