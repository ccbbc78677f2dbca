"""Embedding over HTTP at 2,000, 8,000 and 20,000 genes: cellserve, Triton, MLServer, plain BentoML, and scvi-tools in its own process.

    make bench-servers                                        # all sizes, about 25 minutes
    python -m benchmarks.embed_servers --genes 2000           # one size; the others stay in the result as they were

All sides run the same network on the same real cells (workload.py). The servers are started once per size and asked in turns, in rounds,
while the others are stopped (SIGSTOP); clients share the CPUs with the server that they ask, and have one request at a time each. Timed is
what a client waits for: sending a request that was prepared beforehand, reading the whole answer and making it an array
(servers/clients.py). The other servers get dense matrices and are spared the work of making them. scvi-tools has all cells in memory,
pays for no HTTP, and counts with its best minibatch size. One cell is asked for at a fixed rate, whether or not the last answer has come
(open loop); its time counts from when it was due. Between such requests the machine idles and caches grow cold, so that one cell is also
asked for without a pause (closed loop).

With --provider cuda all sides run on the GPU (environments with onnxruntime-gpu, and a torch with CUDA); the result goes to
embed_servers_cuda.json. cellserve runs graphs by plain session.run there, without IO binding or pinned buffers.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.servers.clients import SIDES, Ask, Connect, Latent
from benchmarks.servers.served import Running, Served
from benchmarks.servers.start import SERVERS, memory, paused
from benchmarks.workload import DATA, N_LATENT, NAME, ROOT, SCVI_PYTHON, Workload, workload

CELLS = 256
CLIENTS = (1, 8)
N_PIECES = 4
"""Different requests that a client sends in turn."""

SCVI_SIZES = (128, 256, 512, 1024, 2048, 4096)
N_CONNECTIONS = 4
"""Of the open loop."""

TOLERANCE = 1e-3
"""Largest difference of a latent from another server's: all run the same graph, in batches of other shapes."""


def side_by_side(connect: Connect, port: int, n_clients: int, work: Callable[[int, Ask, float], None]) -> float:
    """Run `work(number, ask, begin)` for so many clients, each in a thread with a connection of its own; seconds from begin to end."""
    barrier = threading.Barrier(n_clients + 1)
    begin = [0.0]

    def run(number: int) -> None:
        try:
            ask = connect(port)
            ask(number)
        except BaseException:
            barrier.abort()  # the others would wait for ever
            raise
        barrier.wait()
        barrier.wait()
        work(number, ask, begin[0])

    with ThreadPoolExecutor(n_clients) as pool:
        jobs = [pool.submit(run, number) for number in range(n_clients)]
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(120)
            begin[0] = time.perf_counter()
            barrier.wait()
        for job in jobs:
            job.result()
        return time.perf_counter() - begin[0]


def throughput(connect: Connect, port: int, n_clients: int, seconds: float) -> float:
    """Cells a second of so many clients, each with one request at a time."""
    numbers = [0] * n_clients

    def work(number: int, ask: Ask, begin: float) -> None:
        while time.perf_counter() < begin + seconds:
            numbers[number] += 1
            assert len(ask(number + numbers[number])) == CELLS  # not the piece that was asked for just before the clock

    spent = side_by_side(connect, port, n_clients, work)
    return CELLS * sum(numbers) / spent


def latencies(connect: Connect, port: int, rate: float, seconds: float) -> list[float]:
    """Milliseconds from when each request was due to its answer, at `rate` a second."""
    spent: list[float] = []

    def work(number: int, ask: Ask, begin: float) -> None:
        for turn in range(number, int(rate * seconds), N_CONNECTIONS):
            due = begin + turn / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            ask(turn)
            spent.append(1e3 * (time.perf_counter() - due))

    side_by_side(connect, port, N_CONNECTIONS, work)
    return spent


def closed_loop(connect: Connect, port: int, seconds: float) -> list[float]:
    """Milliseconds of each request of one client that asks again at once."""
    spent: list[float] = []

    def work(number: int, ask: Ask, begin: float) -> None:
        while (asked := time.perf_counter()) < begin + seconds:
            number += 1
            ask(number)
            spent.append(1e3 * (time.perf_counter() - asked))

    side_by_side(connect, port, 1, work)
    return spent


@contextlib.contextmanager
def scvi_tools(work: Workload, provider: str) -> Iterator[Callable[[int, float], float]]:
    """scvi-tools with the same network loaded; gives cells a second of a minibatch size, measured for so many seconds."""
    command = [
        Path(os.environ[SCVI_PYTHON]).absolute(),
        Path(__file__).with_name("scvi_latent.py"),
        work.file,
        work.scvi,
    ]
    command.append({"cpu": "cpu", "cuda": "gpu"}[provider])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while (line := process.stdout.readline()) != "ready\n":
                if not line:
                    raise RuntimeError(f"scvi-tools ended: {' '.join(map(str, command))}")

            def measure(size: int, seconds: float) -> float:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(f"{size} {seconds}\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            yield measure
        finally:
            process.kill()


def measure_size(n_genes: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one number of genes."""
    work = workload(n_genes)
    cells = work.cells()
    served = Served(work.store, NAME, work.graph, n_genes, N_LATENT, options.servers_python, options.provider)
    bulk = {side: make(cells, served, CELLS, N_PIECES) for side, (_, make) in SIDES.items() if side in options.sides}
    single = {side: SIDES[side][1](cells, served, 1, 16) for side in bulk}
    figures: dict[str, dict[str, list[float]]] = {side: {} for side in bulk}
    scvi: dict[int, list[float]] = {size: [] for size in SCVI_SIZES}

    def note(side: str, name: str, value: float) -> None:
        figures[side].setdefault(name, []).append(value)

    with contextlib.ExitStack() as stack:
        names = {SIDES[side][0] for side in bulk}
        servers = {name: stack.enter_context(SERVERS[name](served)) for name in SERVERS if name in names}
        ask_scvi = stack.enter_context(scvi_tools(work, options.provider))
        check_answers(bulk, servers)
        for turn in range(options.rounds):
            for side, connect in bulk.items():
                port = servers[SIDES[side][0]].port
                with paused(server.pid for server in servers.values() if server.port != port):
                    for n_clients in CLIENTS:
                        note(side, f"{n_clients}_clients", throughput(connect, port, n_clients, options.seconds))
                    spent = latencies(single[side], port, options.rate, options.latency_seconds)
                    without_pause = closed_loop(single[side], port, options.seconds)
                note(side, "p50_ms", float(np.quantile(spent, 0.5)))
                note(side, "p99_ms", float(np.quantile(spent, 0.99)))
                note(side, "closed_p50_ms", float(np.quantile(without_pause, 0.5)))
            # The best size shows in the first round; after it only the best two go on.
            best = sorted(scvi, key=lambda size: -statistics.median(scvi[size])) if turn else list(scvi)
            with paused(server.pid for server in servers.values()):
                for size in best[:2] if turn else best:
                    scvi[size].append(ask_scvi(size, options.seconds))
        in_memory = {name: memory(server.pid)["pss"] for name, server in servers.items()}
    n_rounds = max(map(len, scvi.values()))
    in_full = {size: statistics.median(values) for size, values in scvi.items() if len(values) == n_rounds}
    return {
        "data": work.data,
        "nonzero_per_cell": round(cells.counts.nnz / cells.counts.shape[0]),
        "rounds": options.rounds,
        "request_bytes": {"arrow": len(cells.arrow(CELLS, 1)[0]), "dense": 4 * CELLS * n_genes},
        "sides": {
            side: {name: round(statistics.median(values), 3) for name, values in found.items()}
            | {"memory_mb": round(in_memory[SIDES[side][0]] / 1e6)}
            for side, found in figures.items()
        },
        "scvi_tools": {
            "cells_per_second": round(max(in_full.values())),
            "minibatch": max(in_full, key=lambda size: in_full[size]),
        },
        "all": figures | {"scvi_tools": {str(size): values for size, values in scvi.items()}},
    }


def check_answers(connects: dict[str, Connect], servers: dict[str, Running]) -> None:
    """Ask every side for the same cells once; all must give the same latent.

    Raises:
        RuntimeError: they do not.
    """
    first: Latent | None = None
    for side, connect in connects.items():
        latent = connect(servers[SIDES[side][0]].port)(0)
        first = latent if first is None else first
        if latent.shape != first.shape or not np.allclose(latent, first, rtol=0, atol=TOLERANCE):
            raise RuntimeError(f"{side} gives another latent")


def ratios(size: dict[str, Any]) -> dict[str, float]:
    """Ours to the best of the others: throughput (higher is better for us) and latency (lower is)."""
    ours = size["sides"]["cellserve"]
    others = [found for side, found in size["sides"].items() if side != "cellserve"]
    found = {}
    for n_clients in CLIENTS:
        name = f"{n_clients}_clients"
        if others:
            found[f"{name}_to_best_server"] = round(ours[name] / max(other[name] for other in others), 2)
        found[f"{name}_to_scvi_tools"] = round(ours[name] / size["scvi_tools"]["cells_per_second"], 2)
    triton = [found for side, found in size["sides"].items() if side.startswith("Triton")]
    for name in ("p50_ms", "p99_ms", "closed_p50_ms"):
        if triton:
            found[f"{name}_to_triton"] = round(ours[name] / min(other[name] for other in triton), 2)
    return found


def main() -> None:
    """Measure all sides in turns, print, and write the result beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers-python", type=Path, default=ROOT / ".venv-servers/bin/python")
    parser.add_argument("--genes", type=int, nargs="+", choices=sorted(DATA), default=sorted(DATA))
    parser.add_argument(
        "--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="cellserve must be one of them"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per side, number of clients and round")
    parser.add_argument("--latency-seconds", type=float, default=5.0, help="of the open loop, per side and round")
    parser.add_argument("--rate", type=float, default=100.0, help="requests of one cell a second")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `timeout` leaves no server behind
    options.servers_python = options.servers_python.absolute()
    output = options.output or Path(__file__).with_name(f"embed_servers{'_cuda' * (options.provider == 'cuda')}.json")
    before = json.loads(output.read_text()).get("sizes", {}) if output.exists() else {}
    sizes = {name: size for name, size in before.items() if int(name) in DATA}
    for n_genes in options.genes:
        size = measure_size(n_genes, options)
        sizes[str(n_genes)] = {"ratios": ratios(size), **size}
        result = {
            "machine": machine(),
            "provider": options.provider,
            "cells_per_request": CELLS,
            "rate": options.rate,
            "sizes": {name: sizes[name] for name in sorted(sizes, key=int)},
        }
        output.write_text(json.dumps(result, indent=2) + "\n")
        show(n_genes, sizes[str(n_genes)])


def show(n_genes: int, size: dict[str, Any]) -> None:
    """Print one number of genes."""
    table = Table(f"{n_genes:,} genes", *next(iter(size["sides"].values())))
    for side, found in size["sides"].items():
        table.add_row(side, *(f"{value:,.6g}" for value in found.values()))
    console = Console()
    console.print(table)
    console.print(f"scvi-tools: {size['scvi_tools']}; ratios: {size['ratios']}", highlight=False)


if __name__ == "__main__":
    main()
