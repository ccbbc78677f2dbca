"""What the reference's own cells look like, so that whoever serves the model sees when what is sent does not."""

import numpy as np
from numpy.typing import NDArray

from service.cells.columns import Values, Vectors, concatenate
from service.contract.manifest import QUANTILES, Distribution, LevelProfile, Profile
from service.inference.annotate import TASK
from service.inference.model import Model
from service.inference.profile import column_suffix, entropy
from training.data.prepared import encode_cells
from training.run import Run

MAX_CELLS = 20_000
"""Of each part at most, evenly over all: enough for a quantile of 5 % to be right within 0.3 %."""

ROWS = 1024


def profile(run: Run, model: Model) -> Profile:
    """Library sizes and label shares of the training cells; confidence and entropy, as served, of those held out."""
    train = run.prepared.train
    library_size = np.asarray(train.take(_evenly(len(train))).counts.sum(axis=1)).ravel()
    return Profile(n_cells=len(train), library_size=distribution(library_size), labels=_levels(run, model))


def distribution(values: NDArray[np.floating]) -> Distribution:
    """Mean and quantiles of some cells' values, (n_cells,)."""
    found = np.quantile(values.astype(np.float64), [float(quantile) for quantile in QUANTILES])
    quantiles = {name: float(value) for name, value in zip(QUANTILES, found, strict=True)}
    return Distribution(mean=float(values.mean(dtype=np.float64)), quantiles=quantiles)


def _levels(run: Run, model: Model) -> dict[str, LevelProfile]:
    """By level of the data; a level of the family's own, such as its clusters, has no shares in the reference."""
    positions = run.held_out
    if not len(positions) or not set(TASK.graphs) <= set(model.sessions):
        return {}
    cells = run.reference[positions[_evenly(len(positions))]]
    genes = cells.var_names.get_indexer(run.prepared.var.index)
    counts = encode_cells(run.config, cells, genes, run.prepared.batches).counts
    parts = (counts[start : start + ROWS] for start in range(0, counts.shape[0], ROWS))
    answers = concatenate([TASK.run(model, part, TASK.options()) for part in parts])
    profiles = {}
    for i, named in enumerate(run.config.labels):
        level = next(level for level in model.manifest.labels if level.name == named.name)
        labels = run.prepared.train.labels[:, i]
        suffix = column_suffix(model.manifest, level)
        confidence, probabilities = answers[f"conf_score{suffix}"], answers[f"probabilities{suffix}"]
        number = np.bincount(labels[labels >= 0], minlength=len(level.classes))
        if not number.sum():
            continue
        assert isinstance(confidence, Values)
        assert isinstance(probabilities, Vectors)
        profiles[level.name] = LevelProfile(
            shares={name: float(n / number.sum()) for name, n in zip(level.classes, number, strict=True) if n},
            conf_score=distribution(confidence.values.astype(np.float32)),
            entropy=distribution(entropy(probabilities.values)),
            n_held_out=cells.n_obs,
        )
    return profiles


def _evenly(n_cells: int) -> NDArray[np.int64]:
    """At most MAX_CELLS of so many positions, ascending."""
    return np.unique(np.linspace(0, n_cells - 1, min(n_cells, MAX_CELLS)).astype(np.int64))
