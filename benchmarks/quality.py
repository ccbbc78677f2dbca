"""How well models do beside scvi-tools and plain baselines, data set by data set: medians of three seeds.

make bench-quality                                            all data sets
python -m benchmarks.quality cell_lines                       one; the others stay in quality.json as they are
python -m benchmarks.quality cell_lines --select              the validation losses that our configurations were chosen by
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import cell_lines, pbmc_quality
from benchmarks.cell_lines import ScviTools
from benchmarks.machine import machine

ROOT = Path(__file__).parent.parent
DATASETS: dict[str, Callable[[ScviTools, int], dict[str, Any]]] = {
    "cell_lines": cell_lines.measure,
    "pbmc_facs": pbmc_quality.measure_facs,
    "autoencoders": pbmc_quality.measure_autoencoder,
}
"""What measures a data set with so many seeds; its answer is written as it is, and what cell_lines.summary made is printed."""

SELECTIONS: dict[str, Callable[[], dict[str, dict[str, float]]]] = {"cell_lines": cell_lines.select}


def show(name: str, found: dict[str, Any]) -> None:
    """Print every figure that is a median over seeds."""
    table = Table("figure", "median", "least", "most", title=name)
    for path, figure in figures(found):
        table.add_row(
            ": ".join(path), *(f"{x:.3f}" for x in (figure["median"], min(figure["seeds"]), max(figure["seeds"])))
        )
    Console().print(table)


def figures(found: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Figures with where they stand."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from [((*path, key), value)] if "median" in value else figures(value, (*path, key))


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", choices=[*DATASETS, []], help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scvi-seeds", type=int, help="of scvi-tools, which takes minutes for each; default: as many")
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
        scvi = ScviTools(options.scvi_python, options.cache, options.scvi_seeds or options.seeds)
        scvi = ScviTools(options.scvi_python, options.cache, options.scvi_seeds or options.seeds)
        found = DATASETS[name](scvi, options.seeds)
        known[name] = {"machine": machine(), "n_seeds": options.seeds, "n_seeds_scvi_tools": scvi.n_seeds, **found}
        options.output.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
        show(name, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
