"""Figures to bytes, the same bytes for the same figure: no date, no random ids, and text that is never taken for mathematics."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

UNKNOWN = "(unknown)"
_MAX_LEGEND = 40
_STYLE = {
    "svg.hashsalt": "cellserve",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that it is the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Image:
    """A finished plot."""

    name: str
    """Of its file, without the ending."""

    kind: str
    """svg or png."""

    data: bytes
    text: str
    """What it shows, for those who do not see it."""


def draw(name: str, text: str, size: tuple[float, float], paint: Callable[[Figure], None], kind: str = "svg") -> Image:
    """Paint a figure of `size` inches; "png" suits many points, "svg" all else."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "backend": mpl.get_backend()}), warnings.catch_warnings():
        # A class in a script that the font lacks is drawn as boxes, which is no reason to fail.
        warnings.filterwarnings("ignore", "Glyph")
        figure, buffer = Figure(figsize=size), io.BytesIO()
        paint(figure)
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    return Image(name, kind, buffer.getvalue(), text)


def scatter(axes: Axes, points: NDArray[np.float64], names: NDArray[np.object_], order: Sequence[str]) -> list[Line2D]:
    """Points (n, 2) coloured by name, unknown ones grey and below; what belongs into a legend comes back."""
    colours = dict(zip(order, palette(len(order)), strict=True))
    shown = np.array([name or UNKNOWN for name in names], dtype=object)
    known = np.array([name in colours for name in shown])
    size = float(np.clip(6000 / max(len(points), 1), 3, 25))
    axes.scatter(*points[~known].T, s=size, color="0.8", linewidths=0)
    # Shuffled, so that the last class does not cover the others.
    mixed = np.random.default_rng(0).permutation(np.flatnonzero(known))
    axes.scatter(*points[mixed].T, s=size, color=[colours[name] for name in shown[mixed]], linewidths=0)
    axes.set_xticks([])
    axes.set_yticks([])
    entries = [*colours.items(), *([(UNKNOWN, "0.8")] if not known.all() else [])]
    # A leading underscore would keep a name out of the legend.
    return [
        Line2D([], [], marker="o", linestyle="", color=colour, label=f" {name}" if name.startswith("_") else name)
        for name, colour in entries
    ]


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """A legend at the right that stays readable: beyond forty names it says how many it leaves out."""
    left_out = len(handles) - _MAX_LEGEND
    if left_out > 0:
        handles = [*handles[:_MAX_LEGEND], Line2D([], [], linestyle="", label=f"and {left_out} more")]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", ncols=1 + (len(handles) - 1) // 20)


def palette(n_colours: int) -> list[tuple[float, ...]]:
    """Colours that can be told apart, as far as there are that many."""
    if n_colours <= 10:
        return [mpl.colormaps["tab10"](i) for i in range(n_colours)]
    if n_colours <= 20:
        return [mpl.colormaps["tab20"](i) for i in range(n_colours)]
    return [mpl.colormaps["turbo"](value) for value in np.linspace(0.03, 0.97, n_colours)]
