"""Tables of benchmarks/annotation.json and concurrent_clients.json, which `make bench-annotation` and `make bench-concurrent` write."""

import json
from pathlib import Path
from typing import Any

from docs.tables import table

ROOT = Path(__file__).parent.parent
PLACES = {"accuracy": 3, "macro_f1": 3, "expected_calibration_error": 3, "log_loss": 2}


def labels() -> str:
    """Accuracy and macro-F1 of every method."""
    return _labels("accuracy", "macro_f1")


def confidence() -> str:
    """Expected calibration error and log-loss of every method."""
    return _labels("expected_calibration_error", "log_loss")


def _labels(*figures: str) -> str:
    found = {name: one for name, one in _read("annotation").items() if "labels" in one}
    methods = list(dict.fromkeys(method for one in found.values() for method in one["labels"]))
    rows = []
    for name, one in found.items():
        title = f"{name} ({one['cells']['reference']:,} → {one['cells']['query']:,} cells)"
        values = [[one["labels"].get(method, {}).get(figure) for figure in figures] for method in methods]
        rows.append((title, *(" / ".join(_median(*pair) for pair in zip(figures, row, strict=True)) for row in values)))
    return table(("query", *methods), rows) + _seeds(found, "labels")


def _median(figure: str, value: dict[str, Any] | None) -> str:
    return f"{value['median']:.{PLACES[figure]}f}" if value else ""


def _seeds(found: dict[str, Any], part: str) -> str:
    numbers = [one["n_seeds"][part] for one in found.values()]
    assert all(one == numbers[0] for one in numbers), "the setups were measured with different seeds"
    ours = numbers[0]["ours"]
    scanvi = numbers[0].get("scanvi", ours)
    words = "One seed" if ours == 1 else f"Medians of {ours} seeds"
    return f"\n{words}{'' if ours == scanvi else f', of {scanvi} for SCANVI'}.\n"


def prediction_sets() -> str:
    """Coverage and mean size at each asked coverage, where reference and query are of one population."""
    found = {name: one for name, one in _read("annotation").items() if "prediction_sets" in one}
    asked = [
        name.removeprefix("coverage at ") for name in next(iter(found.values()))["prediction_sets"] if "cov" in name
    ]
    rows = [
        (
            name,
            *(
                f"{one['prediction_sets'][f'coverage at {share}']['median']:.3f} / "
                f"{one['prediction_sets'][f'mean size at {share}']['median']:.2f}"
                for share in asked
            ),
        )
        for name, one in found.items()
    ]
    return table(("cells", *(f"{share}: coverage / mean size" for share in asked)), rows) + _seeds(found, "sets")


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
    return table(("cells", "type left out", *methods), rows) + _seeds(found, "unknown")


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
