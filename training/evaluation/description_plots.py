"""Plots of a data set as PNG files: depth, genes, zeros, groups, principal components."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.evaluation.description import Measured

COLOURS = "tab20"
N_COLOURS = 20
"""Values of a column that get a colour of their own; the rarer ones share grey."""

_OTHER = "(others)"


def write(directory: Path, cells: AnnData, measured: Measured, columns: dict[str, str]) -> list[Path]:
    """Write one file per plot; existing ones are replaced.

    Args:
        directory: made if it is not there.
        cells: described.
        measured: of these cells.
        columns: of `obs` to colour by.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = [
        _histogram(directory / "counts_per_cell.png", measured.counts_per_cell, "counts per cell"),
        _histogram(directory / "genes_per_cell.png", measured.genes_per_cell, "genes with counts per cell"),
        _histogram(directory / "cells_per_gene.png", measured.n_cells, "cells with counts per gene"),
        _zeros(directory / "zeros.png", measured),
        _variance(directory / "variance.png", measured),
    ]
    obs = cells.obs[measured.used]
    for column in columns:
        values = obs[column].astype(str)
        written.append(_sizes(directory / f"cells_by_{_safe(column)}.png", values, column))
        written.append(_components(directory / f"pca_{_safe(column)}.png", measured, values, column))
    if not columns:
        written.append(_components(directory / "pca.png", measured, pd.Series("cells", index=obs.index), ""))
    return written


def _histogram(path: Path, values: Any, title: str) -> Path:
    figure, axes = _figure()
    above = np.asarray(values, dtype=float)
    above = above[above > 0]
    # Depths of cells spread over orders of magnitude.
    bins = np.geomspace(above.min(), above.max(), 61) if len(above) and above.max() > above.min() else 10
    axes.hist(above, bins=bins, color="#4c72b0")
    axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.set_ylabel("number")
    return _save(figure, path)


def _zeros(path: Path, measured: Measured) -> Path:
    """Share of zeros against the mean, with what Poisson counts of one rate per gene would show."""
    figure, axes = _figure()
    n_cells = max(len(measured.counts_per_cell), 1)
    mean = measured.total / n_cells
    shown = mean > 0
    axes.scatter(mean[shown], 1 - measured.n_cells[shown] / n_cells, s=3, linewidths=0, color="#4c72b0", label="genes")
    if shown.any():
        line = np.geomspace(mean[shown].min(), mean[shown].max(), 200)
        axes.plot(line, np.exp(-line), color="black", linewidth=1, label="Poisson")
    axes.set_xscale("log")
    axes.set_xlabel("mean count of the gene")
    axes.set_ylabel("share of cells without a count")
    axes.legend(frameon=False)
    return _save(figure, path)


def _variance(path: Path, measured: Measured) -> Path:
    figure, axes = _figure()
    axes.scatter(measured.mean, measured.variance, s=3, linewidths=0, color="#4c72b0")
    axes.set_xlabel("mean of ln(1 + counts per 10,000)")
    axes.set_ylabel("variance")
    return _save(figure, path)


def _sizes(path: Path, values: pd.Series, column: str) -> Path:
    figure, axes = _figure()
    sizes = _grouped(values).value_counts().sort_values()
    axes.barh(sizes.index.astype(str), sizes.to_numpy(), color="#4c72b0")
    axes.set_xlabel("cells")
    axes.set_title(column)
    return _save(figure, path)


def _components(path: Path, measured: Measured, values: pd.Series, column: str) -> Path:
    figure, axes = _figure()
    shown = _grouped(values).to_numpy()[measured.plotted]
    names = sorted(set(shown))
    for i, name in enumerate(names):
        points = measured.components[shown == name]
        colour = "lightgrey" if name == _OTHER else f"C{i}" if len(names) <= len("0123456789") else None
        axes.scatter(points[:, 0], points[:, 1], s=4, linewidths=0, color=colour, label=name or "(none)")
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    if len(names) > 1:
        axes.legend(
            title=column, frameon=False, markerscale=3, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5)
        )
    return _save(figure, path)


def _grouped(values: pd.Series) -> pd.Series:
    common = values.value_counts().index[:N_COLOURS]
    return values.where(values.isin(common), _OTHER)


def _figure() -> tuple[Figure, Axes]:
    # Without pyplot, which keeps figures and asks for a screen.
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_prop_cycle(color=_palette())
    return figure, axes


def _palette() -> list[Any]:
    import matplotlib as mpl

    return list(mpl.colormaps[COLOURS].colors)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    return path


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
