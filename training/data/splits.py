"""Which cells are trained on, which decide when to stop, and which are only ever tested on."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

TRAIN, VALIDATION, TEST, PUBLISHED = "train", "validation", "test", "published"
PARTS = (TRAIN, VALIDATION, TEST, PUBLISHED)


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


def split_cells(cells: AnnData, strata: Iterable[Any], test: float, validation: float, seed: int) -> Split:
    """Draw test and validation cells from every stratum alike.

    Args:
        cells: those marked "test" in obs["published_split"] are set apart as "published" and drawn for nothing else.
        strata: one value per cell, for example its set and class.
        test: share of each stratum.
        validation: share of each stratum.
        seed: of the draw.

    Returns:
        A part for each cell. A stratum of three cells or more has at least one cell in each part.
    """
    generator = np.random.default_rng(seed)
    published = cells.obs.get("published_split")
    is_published = np.zeros(cells.n_obs, bool) if published is None else (published == "test").to_numpy()
    stratum = np.array([str(value) for value in strata])
    part = np.full(cells.n_obs, TRAIN, dtype=object)
    part[is_published] = PUBLISHED
    for value in sorted(set(stratum)):
        members = generator.permutation(np.flatnonzero((stratum == value) & ~is_published))
        if len(members) < len((TRAIN, VALIDATION, TEST)):
            continue
        n_test, n_validation = (max(1, round(share * len(members))) for share in (test, validation))
        part[members[:n_test]] = TEST
        part[members[n_test : n_test + n_validation]] = VALIDATION
    return Split(dict(zip(cells.obs_names, part.tolist(), strict=True)))
