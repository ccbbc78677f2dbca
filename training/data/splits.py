"""Which cells are trained on, which decide when to stop, and which are only ever tested on."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

TRAIN, VALIDATION, CALIBRATION, TEST, PUBLISHED = "train", "validation", "calibration", "test", "published"
PARTS = (TRAIN, VALIDATION, CALIBRATION, TEST, PUBLISHED)
STRATIFIED, RANDOM, SEQUENTIAL, HELD_OUT = "stratified", "random", "sequential", "held_out"
METHODS = (STRATIFIED, RANDOM, SEQUENTIAL, HELD_OUT)


class UnknownBatch(Exception):
    """A batch that is to be held out does not occur."""


@dataclass(frozen=True)
class Split:
    """Part of each cell, by name; stored with the run, so that an evaluation uses the very same cells."""

    part: dict[str, str]

    def positions(self, cells: AnnData, *parts: str) -> NDArray[np.int64]:
        """Positions in `cells` of those that belong to `parts`, ascending."""
        return np.array([i for i, name in enumerate(cells.obs_names) if self.part.get(name) in parts], dtype=np.int64)

    def dump(self) -> str:
        """JSON that `parse` reads back."""
        names: dict[str, list[str]] = {part: [] for part in PARTS}
        for name, part in self.part.items():
            names[part].append(name)
        return json.dumps(names, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Read what `dump` wrote."""
        return cls({name: part for part, names in json.loads(text).items() for name in names})


def split_cells(
    cells: AnnData,
    strata: Iterable[Any],
    test: float,
    validation: float,
    seed: int,
    is_sequential: bool = False,
    calibration: float = 0.0,
) -> Split:
    """Draw test, validation and calibration cells from every stratum alike.

    Args:
        cells: those marked "test" in obs["published_split"] are set apart as "published" and drawn for nothing else.
        strata: one value per cell, for example its set and class.
        test: share of each stratum; may be 0.
        validation: share of each stratum; may be 0.
        seed: of the draw.
        is_sequential: draw nothing: the last cells of a stratum are test cells, those before them validation cells, and so on.
        calibration: share of each stratum; may be 0. The other parts do not depend on it.

    Returns:
        A part for each cell. A stratum of three cells or more (four with calibration cells) has at least one cell in each part of
        which the share is not 0.
    """
    generator = np.random.default_rng(seed)
    published = cells.obs.get("published_split")
    is_published = np.zeros(cells.n_obs, bool) if published is None else (published == "test").to_numpy()
    stratum = np.array([str(value) for value in strata])
    part = np.full(cells.n_obs, TRAIN, dtype=object)
    part[is_published] = PUBLISHED
    # By sorting and not by comparing with each value: a million cells may have many strata.
    values, code = np.unique(stratum, return_inverse=True)
    usable = np.flatnonzero(~is_published)
    by_stratum = np.split(
        usable[np.argsort(code[usable], kind="stable")],
        np.cumsum(np.bincount(code[usable], minlength=len(values)))[:-1],
    )
    for positions in by_stratum:
        members = positions[::-1] if is_sequential else generator.permutation(positions)
        if len(members) < len((TRAIN, VALIDATION, TEST)) + bool(calibration):
            continue
        start = 0
        for name, share in ((TEST, test), (VALIDATION, validation), (CALIBRATION, calibration)):
            stop = start + (max(1, round(share * len(members))) if share else 0)
            part[members[start:stop]] = name
            start = stop
    return Split(dict(zip(cells.obs_names, part.tolist(), strict=True)))


def hold_out(
    cells: AnnData,
    batch: Iterable[str],
    held_out: tuple[str, ...],
    strata: Iterable[Any],
    validation: float,
    seed: int,
    calibration: float | tuple[str, ...] = 0.0,
) -> Split:
    """Test on whole batches and train on the others.

    Args:
        cells: obs["dataset"] names the data set of each.
        batch: technical batch of each cell.
        held_out: names of data sets or batches; all their cells are test cells, but for those that were published apart.
        strata: from each of which validation cells are drawn alike.
        validation: share of the other cells; may be 0.
        seed: of that draw.
        calibration: share of the other cells that calibrate, or names of data sets or batches whose cells do.

    Raises:
        UnknownBatch: a name is neither a data set nor a batch, or nothing is left to train on.
    """
    names = np.stack([cells.obs["dataset"].astype(str).to_numpy(dtype=object), np.array(list(batch), dtype=object)])
    known = sorted({*names[0], *names[1]})
    calibrating = calibration if isinstance(calibration, tuple) else ()
    if absent := [name for name in (*held_out, *calibrating) if name not in known]:
        raise UnknownBatch(
            f"'{absent[0]}' is to be held out, but is no data set or batch. There are {', '.join(known)}."
        )
    is_calibrating = np.isin(names.astype(str), calibrating).any(axis=0)
    is_held_out = np.isin(names.astype(str), held_out).any(axis=0) | is_calibrating
    if is_held_out.all():
        raise UnknownBatch(f"Holding out {', '.join((*held_out, *calibrating))} leaves nothing to train on.")
    others = split_cells(
        cells[~is_held_out],
        [s for s, out in zip(strata, is_held_out, strict=True) if not out],
        0.0,
        validation,
        seed,
        calibration=0.0 if isinstance(calibration, tuple) else calibration,
    )
    apart = dict(zip(cells.obs_names, np.where(is_calibrating, CALIBRATION, TEST).tolist(), strict=True))
    part = {name: others.part.get(name, apart[name]) for name in cells.obs_names}
    if "published_split" in cells.obs:
        part |= dict.fromkeys(cells.obs_names[(cells.obs["published_split"] == "test").to_numpy()], PUBLISHED)
    return Split(part)
