"""How well models do beside scvi-tools and plain baselines, data set by data set: medians of three seeds.

make bench-quality                                            all data sets
python -m benchmarks.quality cell_lines                       one; the others stay in quality.json as they are
python -m benchmarks.quality cell_lines --select              the validation losses that our configurations were chosen by
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import cell_lines
from benchmarks.cell_lines import ScviTools
from benchmarks.machine import machine

ROOT = Path(__file__).parent.parent
DATASETS: dict[str, Callable[[ScviTools, int], dict[str, Any]]] = {"cell_lines": cell_lines.measure}
"""What measures a data set with so many seeds; its answer is written as it is, and tables of medians are printed of it."""

SELECTIONS: dict[str, Callable[[], dict[str, dict[str, float]]]] = {"cell_lines": cell_lines.select}


def show(name: str, found: dict[str, Any]) -> None:
    """Print every group of figures that has medians, one row each."""
    console = Console()
    for path, figures in groups(found):
        table = Table("", *figures[next(iter(figures))], title=" / ".join((name, *path)))
        for method, values in figures.items():
            table.add_row(method, *(f"{value:.3f}" for value in values.values()))
        console.print(table)


def groups(
    found: dict[str, Any], path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], dict[str, dict[str, float]]]]:
    """Medians as tables: (where it stands, method → figure → median)."""
    made: list[tuple[tuple[str, ...], dict[str, dict[str, float]]]] = []
    table: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        if not isinstance(value, dict):
            continue
        if "median" in value:
            table[key] = {"median": value["median"]}
        elif all(isinstance(part, dict) and "median" in part for part in value.values()):
            table[key] = {name: part["median"] for name, part in value.items()}
        else:
            made += groups(value, (*path, key))
    if table and len({tuple(row) for row in table.values()}) == 1 and all(len(row) == 1 for row in table.values()):
        return [(path, table), *made]
    return ([(path, table)] if table else []) + made


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", choices=[*DATASETS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--select", action="store_true", help="only print validation losses of the hyper-parameters tried"
    )
    parser.add_argument("--scvi-python", default=os.environ.get("CELLSERVE_BENCH_PYTHON"))
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/scvi_quality", help="answers of scvi-tools, kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/quality.json")
    options = parser.parse_args()
    if not options.select and not options.scvi_python:
        parser.error(
            "name the Python that has scvi-tools: --scvi-python or CELLSERVE_BENCH_PYTHON (make bench-quality does)"
        )
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.data or list(DATASETS):
        if options.select:
            print(json.dumps(SELECTIONS[name](), indent=2))
            continue
        found = DATASETS[name](ScviTools(options.scvi_python, options.cache), options.seeds)
        known[name] = {"machine": machine(), "n_seeds": options.seeds, **found}
        options.output.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
        show(name, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
