"""One network over HTTP in variants: its first layer in 8 bits, and behind the answer cache. Each beside plain float32.

    make bench-variants                                       # all sizes, about 6 minutes
    python -m benchmarks.variants --genes 2000                # one size; the others stay in the result as they were

The network and the cells are those of embed_servers.py (workload.py). There are three servers, which are asked in turns, in rounds, while
the others are idle: the artifact in float32, what `--precision int8` makes of the same network, and float32 with a cache of 1 MiB. That
holds some four thousand cells, so that 8,192 different ones, asked for one after the other, are never found again (all misses, and every
answer makes an older one go), and 1,024 always are (all hits). The server's own metrics say how many were. Timed is what embed_servers.py
times: sending a prepared request and reading the whole answer; 256 cells by one client, and single cells at a fixed rate (open loop).
"""

import argparse
import json
import re
import signal
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.embed_servers import CELLS, latencies, throughput
from benchmarks.machine import machine
from benchmarks.raw_http import Connection
from benchmarks.servers import clients
from benchmarks.servers.served import Served
from benchmarks.servers.start import cellserve
from benchmarks.workload import DATA, INT8, N_CELLS, N_LATENT, NAME, Cells, workload

RESULT = Path(__file__).with_suffix(".json")
FLOAT32, ROUNDED, MISSES, HITS = "float32", "int8", "float32, cache: all misses", "float32, cache: all hits"
CACHE = {"CELLSERVE_CACHE_BYTES": str(2**20)}
N_PIECES, N_KNOWN_PIECES = N_CELLS // CELLS, 4
N_SINGLE = 1_024


def different(cells: Cells, number: int) -> Cells:
    """The same cells, each with another first count: the workload repeats cells after some thousands, and here none may come twice."""
    counts = cells.counts.copy()
    counts.data[counts.indptr[:-1]] += np.arange(N_CELLS) // 1_024 + number * (N_CELLS // 1_024)
    return Cells(counts, cells.genes)


@dataclass(frozen=True)
class Side:
    """A way of asking: a connection to the server, and what goes through it."""

    port: int
    bulk: clients.Connect
    n_pieces: int
    single: clients.Connect

    @classmethod
    def of(cls, port: int, served: Served, many: Cells, n_pieces: int, alone: Cells) -> "Side":
        """Requests of so many pieces of `many`, and of single cells of `alone`."""
        bulk = clients.cellserve(many, served, CELLS, n_pieces)
        return cls(port, bulk, n_pieces, clients.cellserve(alone, served, 1, N_SINGLE))

    def latent(self) -> clients.Latent:
        """Of all pieces, asked for one after the other."""
        ask = self.bulk(self.port)
        return np.concatenate([ask(piece) for piece in range(self.n_pieces)])

    def measure(self, options: argparse.Namespace) -> dict[str, float]:
        """One round."""
        self.latent()  # what follows begins with cells that a cache has just lost, or has all
        before = known_cells(self.port)
        rate = throughput(self.bulk, self.port, 1, options.seconds)
        spent = latencies(self.single, self.port, options.rate, options.latency_seconds)
        hits = share_of_hits(before, known_cells(self.port))
        return {"cells_per_second": rate, "p50_ms": float(np.quantile(spent, 0.5)), "hits": hits}


def measure_size(n_genes: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one number of genes."""
    work = workload(n_genes)
    plain = Served(work.store, NAME, work.graph, n_genes, N_LATENT, Path(sys.executable))
    rounded = replace(plain, store=work.int8_store(), name=INT8)
    many, alone, known = (different(work.cells(), number) for number in range(3))
    with cellserve(plain) as exact, cellserve(rounded) as int8, cellserve(plain, **CACHE) as cached:
        sides = {
            FLOAT32: Side.of(exact.port, plain, many, N_PIECES, alone),
            ROUNDED: Side.of(int8.port, rounded, many, N_PIECES, alone),
            MISSES: Side.of(cached.port, plain, many, N_PIECES, alone),
            HITS: Side.of(cached.port, plain, known, N_KNOWN_PIECES, known),
        }
        latents = {name: side.latent() for name, side in sides.items()}
        if not np.array_equal(latents[MISSES], latents[FLOAT32]):
            raise RuntimeError("behind the cache the latent is another one")
        if not np.array_equal(sides[HITS].latent(), replace(sides[HITS], port=exact.port).latent()):
            raise RuntimeError("from the cache the latent is another one")
        found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
        for _ in range(options.rounds):
            for name, side in sides.items():
                for figure, value in side.measure(options).items():
                    found[name].setdefault(figure, []).append(value)
    medians = {
        side: {name: round(statistics.median(values), 4) for name, values in figures.items()}
        for side, figures in found.items()
    }
    return {
        "data": work.data,
        "rounds": options.rounds,
        "sides": medians,
        "ratios": {
            side: {name: round(figures[name] / medians[FLOAT32][name], 2) for name in ("cells_per_second", "p50_ms")}
            for side, figures in medians.items()
            if side != FLOAT32
        },
        "int8_difference": difference(latents[ROUNDED], latents[FLOAT32]),
        "all": found,
    }


def known_cells(port: int) -> dict[str, float]:
    """How many cells the cache knew ("hit") or not ("miss") so far, by the server's own metrics."""
    connection = Connection(port)
    text = bytes(connection.ask(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").content).decode()
    connection.close()
    counted = re.findall(r'^cellserve_cache_cells_total\{outcome="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {outcome: float(number) for outcome, number in counted}


def share_of_hits(before: dict[str, float], after: dict[str, float]) -> float:
    """Of the cells that were asked for in between; 0 where there is no cache."""
    n_hits, n_misses = (after[outcome] - before[outcome] for outcome in ("hit", "miss"))
    return n_hits / max(1, n_hits + n_misses)


def difference(rounded: NDArray[np.float32], exact: NDArray[np.float32]) -> dict[str, float]:
    """How far latents of the same cells (n_cells, n_latent) are off, in standard deviations of each unit over those cells."""
    off = (rounded - exact) / exact.std(axis=0)
    return {
        "n_cells": len(off),
        "root_mean_square": round(float(np.sqrt(np.square(off).mean())), 4),
        "largest": round(float(np.abs(off).max()), 4),
    }


def main() -> None:
    """Measure all sides in turns, print, and write the result beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, nargs="+", choices=sorted(DATA), default=sorted(DATA))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per side and round")
    parser.add_argument("--latency-seconds", type=float, default=5.0, help="of the open loop, per side and round")
    parser.add_argument("--rate", type=float, default=100.0, help="requests of one cell a second")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.rate * options.latency_seconds > N_SINGLE:
        parser.error(f"--rate times --latency-seconds must be {N_SINGLE} at most: single cells would come twice")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `timeout` leaves no server behind
    sizes = json.loads(options.output.read_text())["sizes"] if options.output.exists() else {}
    for n_genes in options.genes:
        size = sizes[str(n_genes)] = measure_size(n_genes, options)
        result = {
            "machine": machine(),
            "cells_per_request": CELLS,
            "rate": options.rate,
            "sizes": {name: sizes[name] for name in sorted(sizes, key=int)},
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")
        table = Table(f"{n_genes:,} genes", *next(iter(size["sides"].values())))
        for side, found in size["sides"].items():
            table.add_row(side, *(f"{value:,.6g}" for value in found.values()))
        Console().print(table)
        Console().print(
            f"ratios to float32: {size['ratios']}; int8, in standard deviations of a latent unit: {size['int8_difference']}",
            highlight=False,
        )


if __name__ == "__main__":
    main()
