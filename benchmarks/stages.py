"""Where a request's time goes, stage by stage in one process, beside the floor of each stage on this machine.

    make bench-stages

Floors: bytes of the body at the speed at which this machine copies memory, and floating-point operations of the encoder at the speed of its
own largest matrix product. Medians; nothing else should run meanwhile.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.embed_http import ROOT, query_cells
from benchmarks.machine import machine
from service.cells.columns import Columns
from service.cells.counts import Cells, check_raw, csr
from service.cells.formats.arrow import FORMAT, ArrowWriter
from service.cells.genes import align
from service.client import bodies
from service.contract import artifact
from service.contract.store import Store
from service.inference import TASKS
from service.inference.model import load
from service.inference.query import prepare
from service.inference.session import choose_runtime

RESULT = Path(__file__).with_suffix(".json")
SIZES = (1, 256, 2048)


def microseconds(work: Callable[[], object], seconds: float = 0.7) -> float:
    """Median time of one call."""
    work()
    spent, begun = [], time.perf_counter()
    while time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return 1e6 * statistics.median(spent)


def as_new(cells: Cells) -> Cells:
    """The same cells without the sums that stay with a matrix once they are known."""
    counts = cells.counts
    return replace(cells, counts=csr(counts.data, counts.indices, counts.indptr, counts.shape[1]))


def serialise(head: dict[str, Any], columns: Columns) -> bytes:
    """An answer in Arrow."""
    writer = ArrowWriter()
    return writer.start(head) + writer.write(columns, None) + writer.end()


def main() -> None:
    """Measure, print, and write the result beside this file."""
    store = Store(ROOT / "models_store")
    model = load(artifact.read(store.path(store.resolve("pbmc"))), choose_runtime("cpu", None, False))
    counts, genes = query_cells(model)
    task = TASKS["embed"]
    options = task.read_options({}, model)
    n_genes = model.manifest.genes.n_genes
    source = np.ones(2**24, np.uint8)
    copy_rate = source.nbytes / microseconds(source.copy)
    left, right = np.ones((2048, 2048), np.float32), np.ones((2048, 2048), np.float32)
    flop_rate = 2 * 2048**3 / microseconds(lambda: left @ right)
    weights = [np.prod(shape) for shape in ((n_genes, 256), (256, 128), (128, 64), (64, model.manifest.n_latent))]
    result = {
        "machine": machine(),
        "copy_bytes_per_us": round(copy_rate),
        "flops_per_us": round(flop_rate),
        "stages": {},
    }
    for size in SIZES:
        body = next(bodies(counts[:size], list(genes), size))
        cells = FORMAT.read(body, 2**30)
        positions, _ = model.genes.locate(cells.genes)
        query = prepare(model, cells)
        columns = task.run(model, query.counts, options)

        head = query.head(model, task, options)
        result["stages"][str(size)] = {
            "bytes": len(body),
            "floor_read": round(len(body) / copy_rate, 1),
            "read": round(microseconds(lambda body=body: FORMAT.read(body, 2**30))),
            "check": round(microseconds(lambda cells=cells: check_raw(as_new(cells)))),
            "align": round(microseconds(lambda cells=cells, at=positions: align(cells.counts, at, n_genes, True))),
            "encode": round(microseconds(lambda query=query: model.encode(query.counts))),
            "floor_encode": round(2 * size * float(sum(weights)) / flop_rate, 1),
            "serialise": round(microseconds(partial(serialise, head, columns))),
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("microseconds", *(f"{size} cells" for size in SIZES))
    for stage in result["stages"]["1"]:
        table.add_row(stage, *(f"{result['stages'][str(size)][stage]:,}" for size in SIZES))
    Console().print(table)


if __name__ == "__main__":
    main()
