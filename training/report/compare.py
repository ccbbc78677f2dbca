"""Runs side by side, from the small files of their directories: nothing is computed again and no cell is read."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from training import config as configuration
from training.config import Config
from training.evaluation.evaluate import EVALUATION
from training.report import curves
from training.report.curves import Curves
from training.report.drawing import Image, draw
from training.report.page import number
from training.run import CONFIG, GENES, PROVENANCE, WEIGHTS, NotARun

SCHEMA_VERSION = 1
"""Of the JSON; raised when a member changes its meaning or goes."""

COMPARABLE = (
    "Losses can be compared within one group only: one likelihood, the same data and the same genes. Within a group, compare whole losses of "
    "one family with the same weights of their parts, and else part by part; another split validates other cells."
)
_ABSENT = "absent"
_OWN_COLUMNS = ("name", "family", "summary", "limits", "licence")
"""Keys that have a column of their own, or are prose."""

_BEST_MODEL = "models.best."
_MAX_LENGTH = 40
_KINDS = ("svg", "png")


class UnknownPlotFormat(Exception):
    """A plot was asked for under a name that ends in no known format."""


@dataclass(frozen=True)
class Entry:
    """What the files of a run say."""

    label: str
    """Its directory, as short as tells it from the others."""

    directory: Path
    config: Config
    group: str
    """Runs of one group have losses that can be compared: likelihood, data sets, and the first digits of the genes' sha256."""

    settings: Mapping[str, Any]
    """All keys, dotted, with the defaults of the family."""

    best_epoch: int
    """Counted from 1."""

    n_epochs: int
    losses: Mapping[str, float | None]
    """Validation loss at the best epoch and its parts, "loss" first; None for what is not finite. Empty without validation cells."""

    curves: Curves | None
    seconds: float
    n_parameters: int | None
    """None where the run was made before this was recorded."""

    n_stored: int
    """Numbers in weights.npz: parameters, and constants such as the genes' means."""

    evaluation: Mapping[str, float]
    """Figures of evaluation.json by dotted name; empty where the run was not evaluated."""


@dataclass(frozen=True)
class Comparison:
    """Runs in order: by group, then from the lowest validation loss."""

    entries: tuple[Entry, ...]
    differing: tuple[str, ...]
    """Keys of the configuration that are not the same in all runs."""

    @property
    def groups(self) -> dict[str, list[Entry]]:
        """Runs by what their losses can be compared within."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.group, []).append(entry)
        return found


def compare(directories: Sequence[Path]) -> Comparison:
    """Read runs; the directories may be given in any order.

    Raises:
        NotARun: a directory lacks a file of a finished run, or one that cannot be read; it is named.
        InvalidConfig: a run's config.yaml.
    """
    short = [directory.resolve().name for directory in directories]
    labels = [
        name if short.count(name) == 1 else str(directory) for name, directory in zip(short, directories, strict=True)
    ]
    entries = [read(directory, label) for directory, label in zip(directories, labels, strict=True)]
    entries.sort(key=lambda entry: (entry.group, _rank(entry.losses.get("loss")), entry.label))
    keys = dict.fromkeys(key for entry in entries for key in entry.settings)
    differing = [key for key in keys if len({_text(entry.settings.get(key, _ABSENT)) for entry in entries}) > 1]
    return Comparison(tuple(entries), tuple(differing))


def read(directory: Path, label: str) -> Entry:
    """What the files of one run say; raises as `compare` does."""
    if missing := [name for name in (CONFIG, GENES, WEIGHTS, PROVENANCE) if not (directory / name).is_file()]:
        raise NotARun(
            f"{directory} holds no finished run: {', '.join(missing)} missing. Name directories that `fit --output` wrote."
        )
    config = configuration.load(directory / CONFIG)
    evaluated = directory / EVALUATION
    try:
        provenance = json.loads((directory / PROVENANCE).read_text())
        best_epoch, n_epochs = int(provenance["best_epoch"]) + 1, int(provenance["n_epochs"])
        best_loss, seconds = provenance["best_validation_loss"], float(provenance["seconds"])
        known_loss = {} if best_loss is None else {"loss": _finite(float(best_loss))}
        with np.load(io.BytesIO((directory / WEIGHTS).read_bytes()), allow_pickle=False) as arrays:
            n_stored = sum(arrays[name].size for name in arrays.files)
        losses = curves.read(directory)
        evaluation = _figures(json.loads(evaluated.read_text())) if evaluated.is_file() else {}
    # KeyError has a message that only its type explains, so the type is told too.
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise NotARun(
            f"{directory} holds a run that cannot be read ({type(error).__name__}: {error}). Fit it again, or leave it out."
        ) from None
    return Entry(
        label=label,
        directory=directory,
        config=config,
        group=_group(config, directory),
        settings=_settings(config),
        best_epoch=best_epoch,
        n_epochs=n_epochs,
        losses=_validation(losses, best_epoch) or known_loss,
        curves=losses,
        seconds=seconds,
        n_parameters=provenance.get("n_parameters"),
        n_stored=n_stored,
        evaluation=evaluation,
    )


def document(comparison: Comparison) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "note": COMPARABLE,
        "differing": list(comparison.differing),
        "runs": [
            {
                "directory": str(entry.directory),
                "name": entry.config.name,
                "family": entry.config.family,
                "group": entry.group,
                "settings": {key: entry.settings.get(key) for key in comparison.differing},
                "best_epoch": entry.best_epoch,
                "n_epochs": entry.n_epochs,
                "validation": dict(entry.losses),
                "seconds": entry.seconds,
                "n_parameters": entry.n_parameters,
                "n_stored": entry.n_stored,
                "evaluation": dict(entry.evaluation),
            }
            for entry in comparison.entries
        ],
    }


def plot_kind(path: Path) -> str:
    """Format of a plot, svg or png, from the name of the file.

    Raises:
        UnknownPlotFormat: neither.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _KINDS:
        raise UnknownPlotFormat(f"{path} cannot be a plot: its name must end in .{' or .'.join(_KINDS)}.")
    return kind


def plot(comparison: Comparison, kind: str) -> Image:
    """Validation losses by epoch, one panel per group, a dot at each run's best epoch."""
    groups = comparison.groups

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(groups), 1, squeeze=False).ravel()
        for position, (panel, (group, entries)) in enumerate(zip(panels, groups.items(), strict=True)):
            for entry in entries:
                values = entry.curves.values.get("loss", {}).get("validation") if entry.curves else None
                if entry.curves is None or values is None:
                    continue
                finite = np.isfinite(values)
                # A leading underscore would keep a name out of the legend.
                name = f" {entry.label}" if entry.label.startswith("_") else entry.label
                (line,) = panel.plot(entry.curves.epoch[finite], values[finite], linewidth=1.2, label=name)
                best = finite & (entry.curves.epoch == entry.best_epoch)
                panel.plot(entry.curves.epoch[best], values[best], marker="o", markersize=4, color=line.get_color())
            panel.set_title(f"{letter(position)}: {group}")
            panel.set_xlabel("epoch")
            panel.set_ylabel("validation loss")
            if panel.lines:
                panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    text = f"Validation loss by epoch of {', '.join(entry.label for entry in comparison.entries)}; a dot marks the best epoch."
    return draw("comparison", text, (7.5, 3.2 * len(groups)), paint, kind)


def _group(config: Config, directory: Path) -> str:
    """Likelihood, data sets, and which genes."""
    likelihood = getattr(config.hyperparameters, "likelihood", config.family)
    genes = hashlib.sha256((directory / GENES).read_bytes()).hexdigest()
    return f"{likelihood} on {', '.join(sorted(config.datasets))}, genes {genes[:8]}"


def _settings(config: Config) -> dict[str, Any]:
    found = config.model_dump(mode="json", exclude={*_OWN_COLUMNS, "model"})
    return _flat({**found, "model": config.hyperparameters.model_dump(mode="json")})


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted key; lists stay whole."""
    found: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, Mapping) and one:
            found |= _flat(one, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = one
    return found


def _figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of an evaluation by dotted name; rows of a list by their query or position, lists of numbers left out."""
    found: dict[str, float] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, one in value.items():
                walk(one, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            for position, one in enumerate(value):
                walk(one, f"{name}.{one.get('query', position)}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value

    walk({key: one for key, one in evaluation.items() if key not in ("schema_version", "seed")}, "")
    return found


def _validation(found: Curves | None, best_epoch: int) -> dict[str, float | None]:
    """Validation loss and its parts of the best epoch; empty where metrics.csv lacks that epoch."""
    if found is None or not (found.epoch == best_epoch).any():
        return {}
    row = int(np.flatnonzero(found.epoch == best_epoch)[-1])
    return {
        name: _finite(float(parts["validation"][row])) for name, parts in found.values.items() if "validation" in parts
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _rank(loss: float | None) -> float:
    return float("inf") if loss is None else loss


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def headlines(entry: Entry) -> dict[str, float]:
    """Figures of the best model for a table: no sizes, no losses, and of each distribution the mean."""
    found = {}
    for name, value in entry.evaluation.items():
        short = name.removeprefix(_BEST_MODEL)
        last = short.rpartition(".")[2]
        is_detail = last.startswith("n_") or (".log_likelihood." in f".{short}" and last != "mean")
        if name.startswith(_BEST_MODEL) and short != "epoch" and not short.startswith("loss.") and not is_detail:
            found[short] = value
    return found


def setting(entry: Entry, key: str) -> str:
    """A setting of a run for a table, cut where it is long; a dash for a family without the key."""
    if key not in entry.settings:
        return "-"
    text = _text(entry.settings[key])
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 1]}…"


def rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What stands in the table: what it is, and for each run, as text."""
    entries = comparison.entries
    letters = {group: letter(position) for position, group in enumerate(comparison.groups)}
    found = [
        ("name", [entry.config.name for entry in entries]),
        ("family", [entry.config.family for entry in entries]),
        ("group", [letters[entry.group] for entry in entries]),
    ]
    found += [(key, [setting(entry, key) for entry in entries]) for key in comparison.differing]
    found.append(("best epoch", [f"{entry.best_epoch} of {entry.n_epochs}" for entry in entries]))
    for part in dict.fromkeys(part for entry in entries for part in entry.losses):
        title = "validation loss" if part == "loss" else f"validation {part}"
        found.append((title, [_figure(entry.losses[part]) if part in entry.losses else "-" for entry in entries]))
    found.append(("seconds", [number(entry.seconds) for entry in entries]))
    found.append(("weights", ["-" if e.n_parameters is None else number(e.n_parameters) for e in entries]))
    shown = [headlines(entry) for entry in entries]
    for name in dict.fromkeys(name for one in shown for name in one):
        found.append((name, [number(one[name]) if name in one else "-" for one in shown]))
    return found


def letter(position: int) -> str:
    """A, B, …, Z, then with a number: A1."""
    return f"{chr(ord('A') + position % 26)}{position // 26 or ''}"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else number(value)
