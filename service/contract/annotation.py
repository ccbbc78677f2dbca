"""What a manifest says of its labels: their levels, how probabilities were calibrated, prediction sets, and unknown cells."""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """As in manifest.py, which is made of these and cannot be imported here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LabelLevel(Strict):
    """One set of classes that `classify` tells apart."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    """The graph's output is called probabilities_<name>."""

    classes: tuple[str, ...]
    """In output order."""

    ontology_ids: tuple[str | None, ...]
    """Cell Ontology term of each class, where it has one."""

    parent: str | None = None
    """An earlier level that this one divides further; the probabilities of a class of it are the sum of its children's."""

    parents: tuple[str, ...] = ()
    """With `parent`: for each class the class of that level that it belongs to."""

    @model_validator(mode="after")
    def _check(self) -> "LabelLevel":
        if len(self.classes) != len(self.ontology_ids):
            raise ValueError(f"{len(self.classes)} classes but {len(self.ontology_ids)} ontology ids")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes repeat")
        if len(self.parents) != (len(self.classes) if self.parent else 0):
            raise ValueError(
                f"{len(self.classes)} classes but {len(self.parents)} parents (none without a parent level)"
            )
        return self


def check_parents(levels: tuple[LabelLevel, ...]) -> None:
    """Refuse levels whose parents do not fit.

    Raises:
        ValueError: a parent level does not come before, lacks a class that is named as parent, or has a class without children.
    """
    earlier: dict[str, LabelLevel] = {}
    for level in levels:
        if level.parent is not None:
            if level.parent not in earlier:
                raise ValueError(
                    f"labels: '{level.name}' has the parent level '{level.parent}', which does not come before it"
                )
            known = earlier[level.parent].classes
            if unknown := sorted(set(level.parents) - set(known)):
                raise ValueError(
                    f"labels: '{level.name}' has the parent '{unknown[0]}', which is no class of '{level.parent}'"
                )
            if childless := sorted(set(known) - set(level.parents)):
                raise ValueError(
                    f"labels: '{childless[0]}' of '{level.parent}' has no class of '{level.name}' below it"
                )
        earlier[level.name] = level


def parent_codes(levels: tuple[LabelLevel, ...], level: LabelLevel) -> NDArray[np.int64]:
    """For each class of a level that has a parent, the position of its parent among the classes of that level."""
    above = next(other for other in levels if other.name == level.parent)
    return np.array([above.classes.index(name) for name in level.parents], dtype=np.int64)


class ReliabilityBin(Strict):
    """Cells whose confidence lies between two tenths."""

    n_cells: Annotated[int, Field(ge=0)]
    confidence: Share
    """Mean probability of the predicted class."""

    accuracy: Share


class Reliability(Strict):
    """How far probabilities can be taken at their word."""

    log_loss: Annotated[float, Field(ge=0)]
    """Mean, in nats."""

    expected_calibration_error: Share
    """Of the predicted class, over 15 bins of equal width (Guo et al. 2017, arXiv:1706.04599)."""

    bins: tuple[ReliabilityBin, ...]
    """Ten of equal width, those without cells left out."""


class LevelCalibration(Strict):
    """What was done to the probabilities of a level; the graph `classify` holds it."""

    method: Literal["none", "temperature", "vector", "dirichlet"]
    """Of logits = weight · ln p + bias: neither, one weight for all, one of each per class, or a whole matrix (Kull et al. 2019)."""

    parameters: dict[str, tuple[float, ...]]
    """`weight`, a number, one per class, or rows one after the other; and `bias`, where the method has one."""

    cells: str
    """The part of the data that it was fitted on."""

    n_cells: Annotated[int, Field(gt=0)]
    n_folds: Annotated[int, Field(gt=1)] | None = None
    """Each of those cells was judged by one of so many networks, which was trained without its fold, and the network that is served was
    trained on more of them. None: the network that is served judged them, and never saw them in a gradient."""

    candidates: dict[str, float]
    """Log-loss of each method, cross-validated in those folds, or else in five parts; the least was kept."""

    before: Reliability
    after: Reliability
    """Cross-validated: each cell's probabilities come from a fit without it."""


class SetSize(Strict):
    """How prediction sets did on the calibration cells, cross-validated."""

    score: Literal["lac", "aps", "raps"]
    """lac: one minus the probability (Sadinle et al. 2019); aps, raps: probability of all that is likelier (Romano 2020, Angelopoulos 2021)."""

    level: str
    asked: Share
    coverage: Share
    mean_size: Annotated[float, Field(ge=0)]


class Conformal(Strict):
    """Where the scores are that prediction sets are made with, at any coverage that a client asks for."""

    file: Literal["reference/conformal.npz"] = "reference/conformal.npz"
    """Per level `<level>/scores` float64 (n_cells,), the probability of all classes but the true one, and `<level>/classes` int32."""

    score: Literal["lac"] = "lac"
    min_class: Annotated[int, Field(gt=0)]
    """Classes with at least as many cells have a quantile of their own; the others share one of all cells."""

    n_cells: dict[str, int]
    """Calibration cells by level."""

    sizes: tuple[SetSize, ...]


class LeftOut(Strict):
    """How a model that never met a class tells its cells from those that it knows."""

    name: str
    n_known: Annotated[int, Field(gt=0)]
    n_unknown: Annotated[int, Field(gt=0)]
    auroc: dict[str, Share]
    """By candidate."""

    detected: Share
    """Cells of the class that fall below the threshold, by the score that was kept."""

    rejected: Share
    """Known cells that do."""


class UnknownDetection(Strict):
    """The graph `map_score`: whether a cell is like those of the reference at all."""

    score: str
    """The candidate that the graph computes."""

    threshold: Share
    """Cells whose `mapping_score` is below are answered `Unknown`: about the share of cells of the reference that are, too."""

    level: str
    """Label level of which one class after the other was left out."""

    share_of_epochs: Annotated[float, Field(gt=0, le=1)]
    """Of the configuration's, that the networks without the class were trained for."""

    cells: str
    """The part of the data that known cells are taken from."""

    n_cells: Annotated[int, Field(gt=0)]
    n_folds: Annotated[int, Field(gt=1)] | None = None
    """As in LevelCalibration: the networks that the known cells were judged by, each trained without its fold."""

    mean_auroc: dict[str, Share]
    """By candidate, over the classes."""

    left_out: tuple[LeftOut, ...]
