"""What annotation.py asks: cells to learn from and cells to annotate, drawn alike and over the same genes for every method."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from benchmarks.cell_lines import CELSEQ, DROPSEQ
from training import config as configuration
from training.config import Config
from training.data.prepared import add_labels, prepare, split_reference
from training.data.reference import load_reference
from training.data.splits import PUBLISHED, TEST, TRAIN, VALIDATION, Split

CONFIGS = Path(__file__).parent.parent / "training/configs"
BLOOD, LINES = CONFIGS / "pbmc.yaml", CONFIGS / "cell_lines.yaml"


@dataclass(frozen=True)
class Setup:
    """Where cells come from, and which of them are asked about."""

    path: Path
    """Of the configuration."""

    changes: dict[str, Any] = field(default_factory=dict)
    """What of it is replaced."""

    query: str = TEST
    """Part of the split."""

    parts: tuple[str, ...] = ("labels",)
    """What annotation.py measures of it: labels; sets where query cells are drawn from the same sets as the reference, without which
    prediction sets cannot keep their promise; unknown where each type is left out in turn."""

    level: str | None = None
    """Of the labels; None: the first."""


def held_out(*names: str) -> dict[str, Any]:
    """A split whose query are whole data sets or batches."""
    return {"split": {"method": "held_out", "held_out": names}}


SETUPS = {
    "pbmc_facs, 80 to 20": Setup(BLOOD, {"data": ["pbmc_facs"]}, parts=("labels", "sets", "unknown")),
    "pbmc_facs, the sorted populations": Setup(
        BLOOD, {"data": ["pbmc_facs"]}, parts=("unknown",), level="cell_subtype"
    ),
    "pbmc3k, 80 to 20": Setup(BLOOD, {"data": ["pbmc3k"]}, parts=("labels", "sets")),
    "pbmc_facs, the published 100": Setup(
        BLOOD, {"data": ["pbmc_facs"], "split": {"test": 0.0}}, query=PUBLISHED, parts=("labels", "sets")
    ),
    "pbmc_facs → pbmc3k": Setup(BLOOD, held_out("pbmc3k")),
    "pbmc3k → pbmc_facs": Setup(BLOOD, held_out("pbmc_facs")),
    "cell lines, 80 to 20": Setup(LINES, parts=("labels", "sets", "unknown")),
    "CEL-seq2 → Drop-seq": Setup(LINES, held_out(DROPSEQ)),
    "Drop-seq → CEL-seq2": Setup(LINES, held_out(*CELSEQ)),
}


@dataclass(frozen=True)
class Task:
    """Cells to learn from and cells to annotate, with `batch` and `label` in obs."""

    reference: ad.AnnData
    query: ad.AnnData
    classes: tuple[str, ...]

    @property
    def truth(self) -> NDArray[np.int64]:
        """Class of each query cell, -1 for one that is none of the reference's."""
        return np.array(
            [self.classes.index(label) if label in self.classes else -1 for label in self.query.obs["label"]]
        )

    def joined(self) -> ad.AnnData:
        """Both as the other side's scripts take them."""
        cells = ad.concat([self.reference, self.query])
        cells.obs["part"] = np.repeat(["reference", "query"], [self.reference.n_obs, self.query.n_obs])
        return cells


@dataclass(frozen=True)
class Material:
    """A setup with a seed: cells, their split, and the genes that were chosen from its training cells."""

    setup: Setup
    config: Config
    reference: ad.AnnData
    split: Split
    genes: pd.Index

    def task(self, without: str | None = None) -> Task:
        """Labelled cells over the chosen genes. Cells of one class may be kept from the reference.

        Query cells of types that the reference never had are left out, since nobody could name them.
        """
        level = self.config.labels[0]
        labels = self.reference.obs[level.name].astype(str)
        parts = []
        for names in ((TRAIN, VALIDATION), (self.setup.query,)):
            positions = self.split.positions(self.reference, *names)
            positions = positions[labels.iloc[positions].isin(level.classes).to_numpy()]
            if self.setup.query not in names:
                positions = positions[(labels.iloc[positions] != without).to_numpy()]
            cells = self.reference[positions, self.genes]
            obs = {"batch": cells.obs["batch"].astype(str).to_numpy(), "label": labels.iloc[positions].to_numpy()}
            made = ad.AnnData(sp.csr_matrix(cells.X, dtype=np.float32), obs=obs, var=cells.var[[]].copy())
            made.obs_names = cells.obs_names
            parts.append(made)
        return Task(parts[0], parts[1], tuple(name for name in level.classes if name != without))


def prepared(setup: Setup, seed: int) -> Material:
    """Cells, split and genes of a setup; `training.run.fit` of its configuration makes the same of them.

    The configuration has one level of labels only, and those of its classes that training cells have. All methods learn from its training
    and validation cells, over these genes.
    """
    document = configuration.load(setup.path).model_dump(mode="json") | setup.changes | {"seed": seed}
    level_name = setup.level or document["labels"][0]["name"]
    document["labels"] = [
        level | {"parent": None, "parents": {}} for level in document["labels"] if level["name"] == level_name
    ]
    config = Config.model_validate(document)
    reference = load_reference(config.data, config.cells, config.map_symbols, seed)
    add_labels(config, reference)
    split = split_reference(config, reference)
    level = config.labels[0]
    known = set(reference.obs[level.name].iloc[split.positions(reference, TRAIN)].astype(str))
    classes = {name: term for name, term in level.classes.items() if name in known}
    config = config.model_copy(update={"labels": (level.model_copy(update={"classes": classes}),)})
    with tempfile.TemporaryDirectory() as scratch:
        return Material(setup, config, reference, split, prepare(config, reference, split, Path(scratch)).var.index)
