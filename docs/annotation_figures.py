"""Tables of benchmarks/annotation.json and concurrent_clients.json, which `make bench-annotation` and `make bench-concurrent` write."""

import json
from pathlib import Path
from typing import Any

from docs.tables import table

ROOT = Path(__file__).parent.parent
OURS = "cellserve"
PLACES = {"accuracy": 3, "macro_f1": 3, "expected_calibration_error": 3, "log_loss": 2, "ece_floor": 3}


def labels() -> str:
    """Accuracy and macro-F1 of every method."""
    return _labels(("accuracy", "macro_f1"), ())


def confidence() -> str:
    """Expected calibration error and log-loss of every method, and the error that our probabilities would show if they were exactly right."""
    return _labels(("expected_calibration_error", "log_loss"), (("cellserve, if exactly right", OURS, "ece_floor"),))


def _labels(figures: tuple[str, ...], more: tuple[tuple[str, str, str], ...]) -> str:
    """Figures of every method, and further columns: what they are called, of which method and which figure."""
    found = {name: one for name, one in _read("annotation").items() if "labels" in one}
    methods = list(dict.fromkeys(method for one in found.values() for method in one["labels"]))
    rows = []
    for name, one in found.items():
        title = f"{name} ({one['cells']['reference']:,} → {one['cells']['query']:,} cells)"
        values = [[one["labels"].get(method, {}).get(figure) for figure in figures] for method in methods]
        cells = [" / ".join(_median(*pair) for pair in zip(figures, row, strict=True)) for row in values]
        cells += [_median(figure, one["labels"][method].get(figure)) for _, method, figure in more]
        rows.append((title, *cells))
    numbers = [{method: one["labels"][method]["accuracy"] for method in one["labels"]} for one in found.values()]
    return table(("query", *methods, *(name for name, *_ in more)), rows) + _seeds(numbers)


def _median(figure: str, value: dict[str, Any] | None) -> str:
    return f"{value['median']:.{PLACES[figure]}f}" if value else ""


def _seeds(found: list[dict[str, Any]]) -> str:
    """How many seeds, from one figure of each method in every setup."""
    numbers: dict[str, set[int]] = {}
    for one in found:
        for method, figure in one.items():
            numbers.setdefault(method, set()).add(len(figure["seeds"]))
    assert all(len(n) == 1 for n in numbers.values()), "the setups were measured with different seeds"
    ours = numbers[OURS]
    others = [f", of {n} for {method}" for method, (n,) in numbers.items() if {n} != ours]
    words = "One seed" if ours == {1} else f"Medians of {min(ours)} seeds"
    return f"\n{words}{''.join(others)}.\n"


def prediction_sets() -> str:
    """Coverage and mean size at each asked coverage, where reference and query are of one population."""
    rows, asked = [], list[str]()
    for name, one in _read("annotation").items():
        for method, figures in one.get("prediction_sets", {}).items():
            asked = [figure.removeprefix("coverage at ") for figure in figures if "coverage" in figure]
            values = [
                [figures[f"{kind} at {share}"]["median"] for kind in ("coverage", "mean size")] for share in asked
            ]
            n_seeds = str(len(next(iter(figures.values()))["seeds"]))
            rows.append((name, method, n_seeds, *(f"{coverage:.3f} / {size:.2f}" for coverage, size in values)))
    return table(("cells", "model", "seeds", *(f"{share}: coverage / mean size" for share in asked)), rows)


def unknown() -> str:
    """AUROC of telling cells of a type that a model never met, by type."""
    rows: list[tuple[str, ...]] = []
    methods: list[str] = []
    found = {name: one for name, one in _read("annotation").items() if "unknown" in one}
    for name, one in found.items():
        methods = list(one["unknown"]["over_types"]["all types"])
        parts = {
            **one["unknown"]["types"],
            **{f"**median, {group}**": m for group, m in one["unknown"]["over_types"].items()},
        }
        rows += [
            (name, part, *(f"{values[method]['median']:.3f}" if method in values else "" for method in methods))
            for part, values in parts.items()
        ]
    return table(("cells", "type left out", *methods), rows) + _seeds(
        [one["unknown"]["over_types"]["all types"] for one in found.values()]
    )


def concurrent() -> str:
    """Answers of one model to clients with different genes, asked at once."""
    found = _read("concurrent_clients")
    rows = [
        (name, *(f"{found[name][outcome]:,}" for outcome in ("answers", "differ", "failed")))
        for name in ("cellserve", "CellTypist")
    ]
    return table((f"{found['clients']} clients at once", "answers", "other than alone", "failed"), rows)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/{name}.json").read_text())
    return found
