"""The models that a run leaves: that of its best epoch, and that of its last."""

from dataclasses import dataclass
from pathlib import Path

import torch

from training import fit as fitting
from training.families.family import Family
from training.run import Run

BEST, LAST = fitting.BEST, fitting.LAST
MEANING = {
    BEST: "the epoch of the lowest validation loss, or the last without validation cells: what is exported",
    LAST: "the epoch that training ended with",
}


class NoCheckpoint(Exception):
    """The last model of a run is gone."""


@dataclass(frozen=True)
class Model:
    """A family with the weights of an epoch."""

    family: Family
    epoch: int
    """From 0."""


def load(run: Run, directory: Path, which: str) -> Model:
    """The best or the last model of a run, in evaluation mode.

    Raises:
        NoCheckpoint: the last one was not kept.
    """
    if which == BEST:
        return Model(run.family.eval(), int(run.provenance["best_epoch"]))
    path = directory / fitting.CHECKPOINTS / f"{LAST}.ckpt"
    if not has_last(directory):
        raise NoCheckpoint(
            f"{directory} has no {path.relative_to(directory)}, so its last model cannot be evaluated. Use --model best, or fit "
            "the run again."
        )
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    family = fitting.build(run.config, run.prepared)
    prefix = "family."
    family.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in checkpoint["state_dict"].items()})
    return Model(family.eval(), int(checkpoint["epoch"]))


def has_last(directory: Path) -> bool:
    """Whether the last model of a run was kept."""
    return (directory / fitting.CHECKPOINTS / f"{LAST}.ckpt").is_file()
