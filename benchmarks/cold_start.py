"""From the start of the process to ready and to the first answer, and the memory it then takes: cellserve, plain BentoML, Triton, MLServer.

    make bench-cold-start

Each server is started by itself, in turns, in rounds; a round that is not counted goes before, so that files are in the page cache and
Python's bytecode is written. Ready is what the server's own probe says, asked for every 10 ms; then one cell is asked for. All serve the
shipped model: cellserve with all its graphs, gene table and golden cells, the others its encoder alone. Memory is of all processes of the
server after that answer: resident (RSS, where pages that processes share count for each) and divided among those who share it (PSS).
Processor time is of all of them, too, up to then.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.embed_http import query_cells
from benchmarks.machine import machine
from benchmarks.servers.clients import SIDES
from benchmarks.servers.served import Served
from benchmarks.servers.start import SERVERS, memory
from benchmarks.workload import ROOT, Cells
from service.cells.counts import Cells as Sent
from service.contract import artifact
from service.contract.store import Store
from service.inference.model import load
from service.inference.query import prepare
from service.inference.session import choose_runtime

RESULT = Path(__file__).with_suffix(".json")
ASKED = ("cellserve", "BentoML, .npy", "Triton, tritonclient", "MLServer, base64")
GOALS = {"ready_seconds": 3.0, "pss_mb": 300}


def shipped(python: Path) -> tuple[Served, Cells]:
    """The shipped model and one cell over its genes."""
    store = Store(ROOT / "models_store")
    path = store.path(store.resolve("pbmc"))
    model = load(artifact.read(path), choose_runtime("cpu", None, allow_fallback=False))
    counts, genes = query_cells(model)
    query = prepare(model, Sent(genes=genes, counts=counts[:1]))
    manifest = model.manifest
    served = Served(
        ROOT / "models_store", "pbmc", path / "encode.onnx", manifest.genes.n_genes, manifest.n_latent, python
    )
    # Aligned beforehand, so that all sides are asked for the same matrix.
    return served, Cells(query.counts.astype(np.float32), list(model.genes.table.gene_id))


def one_start(side: str, served: Served, cells: Cells) -> dict[str, float]:
    """Start a server, ask it once, end it."""
    name, make = SIDES[side]
    connect = make(cells, served, 1, 1)
    begun = time.perf_counter()
    with SERVERS[name](served) as server:
        # What the benchmark itself does before it starts the process is not the server's time.
        before = time.perf_counter() - begun - server.ready_seconds
        connect(server.port)(0)
        answered = time.perf_counter() - begun - before
        used = memory(server.pid)
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        spent = sum(sum(process.cpu_times()[:2]) for process in processes)
    return {
        "ready_seconds": server.ready_seconds,
        "first_answer_seconds": answered,
        "cpu_seconds": spent,
        "rss_mb": used["rss"] / 1e6,
        "pss_mb": used["pss"] / 1e6,
    }


def main() -> int:
    """Measure, print and write; 1 where cellserve misses a goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers-python", type=Path, default=ROOT / ".venv-servers/bin/python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=ASKED, default=ASKED)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `timeout` leaves no server behind
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it every start of a server would compile all that it imports
    served, cells = shipped(options.servers_python.absolute())
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for turn in range(options.rounds + 1):
        for side in options.sides:
            figures = one_start(side, served, cells)
            if turn:
                found[side].append(figures)
    medians = {
        side: {name: round(statistics.median(one[name] for one in starts), 2) for name in starts[0]}
        for side, starts in found.items()
    }
    result: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "sides": medians, "all": found}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("", *next(iter(medians.values())))
    for side, figures in medians.items():
        table.add_row(side, *(f"{value:,}" for value in figures.values()))
    Console().print(table)
    return int(any(medians["cellserve"][name] >= limit for name, limit in GOALS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
