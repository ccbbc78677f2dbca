"""Cells per second: embedding over HTTP beside raw session.run and scvi-tools in its own process.

    make bench

All sides embed the same real cells (pbmc3k, the model's genes) with an encoder of the same size, one after the other on the
same machine, in rounds, and the medians over rounds are compared as ratios. Client and server share the CPUs, as they do for
whoever tries this at home; scvi-tools and session.run have them to themselves, and pay for no HTTP, no parsing and no alignment.

The floor: an encoder of G genes and H hidden units needs 2·G·H floating-point operations per cell and, densified, 4·G bytes of input.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import scipy.sparse as sp
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from service.client import bodies
from service.contract import artifact
from service.contract.store import Store
from service.inference.model import Model, load
from service.inference.session import choose_runtime
from tests.end_to_end.server import running_server
from training.data import registry

ROOT = Path(__file__).parent.parent
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
SIZES = (1, 64, 256, 2048)
SCVI_SIZES = (128, 256, 1024, 2048)
N_CELLS = 8192
N_HIDDEN = 256


def query_cells(model: Model) -> tuple[sp.csr_matrix, tuple[str, ...]]:
    """Real cells over the model's genes, repeated to N_CELLS, float32."""
    data = registry.read("pbmc3k")
    symbols = [str(symbol) for symbol in data.var["gene_symbol"]]
    wanted = set(model.genes.table.gene_symbol)
    known = [column for column, symbol in enumerate(symbols) if symbol in wanted]
    counts = sp.csr_matrix(data.X)[:, known].astype(np.float32)
    rows = np.arange(N_CELLS) % counts.shape[0]
    return counts[rows], tuple(symbols[column] for column in known)


def cells_per_second(work: Callable[[], int], seconds: float) -> float:
    """Repeat `work`, which returns the number of cells it embedded, for at least `seconds`."""
    n_cells, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        n_cells += work()
    return n_cells / spent


def over_http(client: httpx.Client, bodies: list[bytes], size: int, seconds: float) -> float:
    """One client, one request at a time over one connection; every answer is read to its end."""
    turn = iter(range(10**9))

    def work() -> int:
        response = client.post("/v1/embed", content=bodies[next(turn) % len(bodies)], headers=ARROW)
        response.raise_for_status()
        return size

    return cells_per_second(work, seconds)


def raw_session(session: ort.InferenceSession, counts: sp.csr_matrix, size: int, seconds: float) -> float:
    """session.run alone, with ONNX Runtime's own threads, on cells that are dense already: what the runtime can do."""
    dense = counts[:size].toarray()

    def work() -> int:
        session.run(["latent"], {"counts": dense})
        return size

    return cells_per_second(work, seconds)


def scvi_side(python: str, counts: sp.csr_matrix, n_latent: int, seconds: float, rounds: int) -> dict[str, list[float]]:
    """scvi-tools' get_latent_representation, in its own process and environment; cells per second by minibatch size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.npz"
        sp.save_npz(path, counts)
        script = str(Path(__file__).with_name("scvi_side.py"))
        arguments = [str(path), str(N_HIDDEN), str(n_latent), str(seconds), str(rounds), *map(str, SCVI_SIZES)]
        done = subprocess.run([python, script, *arguments], check=True, capture_output=True, text=True)
    measured: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> int:
    """Measure all sides and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per side, size and round")
    parser.add_argument("--scvi-python", default=os.environ.get("CELLSERVE_BENCH_PYTHON"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/embed_http.json")
    options = parser.parse_args()
    store = Store(ROOT / "models_store")
    shipped = artifact.read(store.path(store.resolve("pbmc")))
    model = load(shipped, choose_runtime("cpu", None, allow_fallback=False))
    session = ort.InferenceSession(shipped.graph("encode"), providers=["CPUExecutionProvider"])
    counts, genes = query_cells(model)
    http: dict[int, list[float]] = {size: [] for size in SIZES}
    raw: dict[int, list[float]] = {size: [] for size in SIZES}
    with running_server(ROOT / "models_store") as url, httpx.Client(base_url=url, timeout=60) as client:
        requests = {size: list(bodies(counts[: min(N_CELLS, 16 * size)], list(genes), size)) for size in SIZES}
        for _ in range(options.rounds):
            for size in SIZES:
                http[size].append(over_http(client, requests[size], size, options.seconds))
                raw[size].append(raw_session(session, counts, size, options.seconds))
    scvi = scvi_side(options.scvi_python, counts, model.manifest.n_latent, options.seconds, options.rounds)
    result = {
        "machine": machine(),
        "model": model.id,
        "n_genes": model.manifest.genes.n_genes,
        "nonzero_per_cell": round(counts.nnz / counts.shape[0]),
        "floor": {
            "flops_per_cell": 2 * model.manifest.genes.n_genes * N_HIDDEN,
            "dense_bytes_per_cell": 4 * model.manifest.genes.n_genes,
        },
        "rounds": options.rounds,
        "cells_per_second": {
            "http": {str(size): round(statistics.median(values)) for size, values in http.items()},
            "session_run": {str(size): round(statistics.median(values)) for size, values in raw.items()},
            "scvi_tools": {size: round(statistics.median(values)) for size, values in scvi.items()},
        },
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    measured = result["cells_per_second"]
    best_scvi = max(measured["scvi_tools"].values())
    table = Table(
        "cells per request", "HTTP, cells/s", "session.run, cells/s", "HTTP : session.run", "HTTP : best of scvi-tools"
    )
    for size, rate in measured["http"].items():
        runtime = measured["session_run"][size]
        table.add_row(size, f"{rate:,}", f"{runtime:,}", f"{rate / runtime:.2f}", f"{rate / best_scvi:.2f}")
    console = Console()
    console.print(table)
    sizes = ", ".join(f"{size}: {rate:,}" for size, rate in measured["scvi_tools"].items())
    console.print(f"scvi-tools get_latent_representation, cells/s by minibatch: {sizes}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
