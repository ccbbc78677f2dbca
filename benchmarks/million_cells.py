"""A million cells through one streamed request: how much the resident memory of server and client grows, and how fast it is.

    make bench-stream

The client is `Client.stream`, as a user has it. Cells are made on the fly: real ones, in an order that is computed and not stored, taken
by the sender only as fast as answers are read. Every answer is compared, bit by bit and in order, with that of the same cell in an
ordinary request. Memory is that of the server's worker and of this process before the stream and at its highest, looked at every 50 ms;
a short stream goes before, so that what the first request leaves behind is not counted.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.embed_http import query_cells
from benchmarks.machine import machine
from service.client import Client, bodies, read_answer
from service.contract import artifact
from service.contract.store import Store
from service.inference.model import load
from service.inference.session import choose_runtime
from tests.end_to_end.server import ROOT, Server

RESULT = Path(__file__).with_suffix(".json")
PIECE = 2_048
GOAL_MB = 200
STRIDE = 7_919
"""Prime, so that all cells come up and neighbours in the stream are none in the data."""


class Memory(threading.Thread):
    """Resident bytes of processes by name; the highest since `begin`."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        super().__init__(name="memory", daemon=True)
        self._processes = processes
        self._is_over = threading.Event()
        self.before = {name: process.memory_info().rss for name, process in processes.items()}
        self.highest = dict(self.before)

    def run(self) -> None:
        """Look until stopped."""
        while not self._is_over.wait(0.05):
            for name, process in self._processes.items():
                self.highest[name] = max(self.highest[name], process.memory_info().rss)

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()
        self.join()


def rows(start: int, stop: int, n_source: int) -> NDArray[np.int64]:
    """Which of the source's cells stand at these places of the stream."""
    return np.arange(start, stop, dtype=np.int64) * STRIDE % n_source


def cells(source: sp.csr_matrix, n_cells: int) -> Iterator[sp.csr_matrix]:
    """The stream, piece by piece."""
    for start in range(0, n_cells, PIECE):
        yield source[rows(start, min(start + PIECE, n_cells), source.shape[0])]


def latent_of(table: pa.Table | pa.RecordBatch) -> NDArray[np.float32]:
    """The column `latent` as a matrix."""
    column = table.column("latent")
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    latent: NDArray[np.float32] = column.flatten().to_numpy().reshape(len(column), -1)
    return latent


def expected(client: Client, source: sp.csr_matrix, genes: list[str]) -> NDArray[np.float32]:
    """Latent of each cell of the source, by ordinary requests."""
    headers = {"Content-Type": "application/vnd.apache.arrow.stream"}
    answers = []
    for body in bodies(source, genes, PIECE):
        response = client._http.post("/v1/embed?model=pbmc", content=body, headers=headers)
        answers.append(latent_of(read_answer(response.raise_for_status().content)))
    return np.concatenate(answers)


def stream(
    client: Client, source: sp.csr_matrix, genes: list[str], wanted: NDArray[np.float32], n_cells: int
) -> dict[str, float]:
    """Send and check one stream; seconds to its first answer and to its end.

    Raises:
        RuntimeError: answers are missing, in another order or of other bits.
    """
    position, first, started = 0, 0.0, time.perf_counter()
    for batch in client.stream("embed", cells(source, n_cells), genes):
        first = first or time.perf_counter() - started
        stop = position + batch.num_rows
        if not np.array_equal(latent_of(batch), wanted[rows(position, stop, source.shape[0])]):
            raise RuntimeError(f"cells {position} to {stop} have other answers than by themselves")
        position = stop
    if position != n_cells:
        raise RuntimeError(f"{n_cells} cells, {position} answers")
    return {"first": first, "whole": time.perf_counter() - started}


def measure(n_cells: int) -> dict[str, Any]:
    """Stream once to warm up, then measure."""
    store = Store(ROOT / "models_store")
    model = load(artifact.read(store.path(store.resolve("pbmc"))), choose_runtime("cpu", None, allow_fallback=False))
    source, names = query_cells(model)
    genes = list(names)
    server = Server(ROOT / "models_store", CELLSERVE_LOG_LEVEL="WARNING")
    try:
        server.start().wait_until_ready()
        assert server.process is not None
        with Client(server.url, model="pbmc", cells_per_request=PIECE) as client:
            wanted = expected(client, source, genes)
            stream(client, source, genes, wanted, 16 * PIECE)
            worker = max(
                psutil.Process(server.process.pid).children(recursive=True), key=lambda one: one.memory_info().rss
            )
            memory = Memory({"server": worker, "client": psutil.Process()})
            memory.start()
            seconds = stream(client, source, genes, wanted, n_cells)
            memory.stop()
        server.stop()
    finally:
        server.close()
    return {
        "machine": machine(),
        "n_cells": n_cells,
        "n_genes": len(genes),
        "nonzero_per_cell": round(source.nnz / source.shape[0]),
        "cells_per_second": round(n_cells / seconds["whole"]),
        "seconds": round(seconds["whole"], 2),
        "seconds_to_first_answer": round(seconds["first"], 4),
        "memory_mb": {
            name: {
                "before": round(memory.before[name] / 1e6),
                "highest": round(memory.highest[name] / 1e6),
                "growth": round((memory.highest[name] - memory.before[name]) / 1e6),
            }
            for name in memory.before
        },
    }


def main() -> int:
    """Measure, print and write; 1 where memory grew more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `timeout` leaves no server behind
    result = measure(options.cells)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("figure", "value")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)
    return int(any(one["growth"] >= GOAL_MB for one in result["memory_mb"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
