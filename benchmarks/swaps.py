"""Two hundred exchanges of a version under load: failed requests, memory, and how long an exchange and a request take.

    python -m benchmarks.swaps                 # with the interpreter of CELLSERVE_TEST_SERVER_PYTHON as the server's

The shipped model is written again and again under new versions, by rename, and `default` is pointed at each; the version before the last is
removed. A server polls the store, clients embed without a pause, and every answer is looked at: its status, that it is whole, that it has
the bits that the model always has, and which version gave it. Memory is the server's own (USS), measured between exchanges.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from service.client import bodies
from service.contract import artifact
from service.contract.store import ModelId, Store
from tests.builders import counts
from tests.end_to_end.server import ROOT, Server

RESULT = Path(__file__).with_suffix(".json")
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
N_CELLS = 16
POLL_SECONDS = 0.1
SECONDS_PER_SWAP = 60
N_WARM = 20
"""Exchanges before memory is compared: allocators keep what the first ones made them take."""


@dataclass
class Load:
    """Clients that ask without a pause, and what they saw."""

    url: str
    body: bytes
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    bits: set[bytes] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)
    is_over: bool = False

    def ask(self) -> None:
        """One client, until it is over."""
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self.is_over:
                started = time.perf_counter()
                try:
                    answer = client.post("/v1/embed?model=pbmc", content=self.body, headers=ARROW)
                    answer.raise_for_status()
                    with pa.ipc.open_stream(answer.content) as reader:
                        latent = reader.read_all().column("latent").combine_chunks().flatten()
                except (httpx.HTTPError, pa.ArrowException) as error:
                    self.failures.append(repr(error)[:200])
                    continue
                self.seconds.append(time.perf_counter() - started)
                self.bits.add(latent.to_numpy().tobytes())
                self.versions.add(answer.headers["X-Cellserve-Model"])


def copy_version(content: artifact.Artifact, root: Path, version: str) -> None:
    """Write the same model under another version."""
    artifact.write(root, content.manifest.model_copy(update={"version": version}), content.contents)


def memory_bytes(server: Server) -> int:
    """Memory that belongs to the worker alone."""
    assert server.process is not None
    workers = psutil.Process(server.process.pid).children(recursive=True)
    return max(int(worker.memory_full_info().uss) for worker in workers)


def measure(n_swaps: int, n_clients: int) -> dict[str, object]:
    """Exchange `n_swaps` times and collect the figures."""
    shipped = Store(ROOT / "models_store")
    content = artifact.read(shipped.path(shipped.resolve("pbmc")))
    genes = list(content.genes.gene_symbol)
    body = next(bodies(counts(N_CELLS, len(genes), density=0.2), genes, N_CELLS))
    with tempfile.TemporaryDirectory(prefix="cellserve-swaps-") as folder:
        store = Store(Path(folder) / "store")
        copy_version(content, store.root, "0")
        store.set_alias(ModelId("pbmc", "0"))
        server = Server(store.root, CELLSERVE_STORE_POLL_S=str(POLL_SECONDS), CELLSERVE_LOG_LEVEL="WARNING")
        try:
            server.start().wait_until_ready()
            load = Load(server.url, body)
            clients = [threading.Thread(target=load.ask) for _ in range(n_clients)]
            for client in clients:
                client.start()
            time.sleep(5)
            n_quiet = len(load.seconds)
            swap_seconds, memory = [], []
            for number in range(1, n_swaps + 1):
                copy_version(content, store.root, str(number))
                started = time.perf_counter()
                store.set_alias(ModelId("pbmc", str(number)))
                while f"pbmc@{number}" not in load.versions:
                    if time.perf_counter() - started > SECONDS_PER_SWAP:
                        raise SystemExit(
                            f"version {number} did not answer within {SECONDS_PER_SWAP} s:\n{server.log()[-3000:]}"
                        )
                    time.sleep(0.01)
                swap_seconds.append(time.perf_counter() - started)
                if number > 1:
                    shutil.rmtree(store.root / "pbmc" / str(number - 2))
                memory.append(memory_bytes(server))
            load.is_over = True
            for client in clients:
                client.join()
            n_held = server.metric("cellserve_models_held")
            server.stop()
        finally:
            server.close()
    # Each half's median: one measurement may fall between a load and the release of what went before.
    warm = memory[min(N_WARM, len(memory) // 2) :]
    first, second = warm[: len(warm) // 2] or warm, warm[len(warm) // 2 :]
    quiet, during = load.seconds[:n_quiet], load.seconds[n_quiet:]
    return {
        "machine": machine(),
        "n_swaps": n_swaps,
        "n_clients": n_clients,
        "n_requests": len(load.seconds),
        "n_failed": len(load.failures),
        "failures": load.failures[:5],
        "n_versions_seen": len(load.versions),
        "n_sets_of_bits": len(load.bits),
        "n_models_held_at_the_end": n_held,
        "seconds_to_exchange_median": round(statistics.median(swap_seconds), 3),
        "seconds_to_exchange_max": round(max(swap_seconds), 3),
        "milliseconds_p50_quiet": _milliseconds(quiet, 50),
        "milliseconds_p50_during": _milliseconds(during, 50),
        "milliseconds_p99_quiet": _milliseconds(quiet, 99),
        "milliseconds_p99_during": _milliseconds(during, 99),
        "memory_bytes": {"first_half": int(statistics.median(first)), "second_half": int(statistics.median(second))},
        "memory_bytes_after_each": memory,
    }


def _milliseconds(seconds: list[float], percent: int) -> float:
    return round(1000 * statistics.quantiles(seconds, n=100)[percent - 1], 2)


def main() -> int:
    """Measure, print and write; 1 where a request failed or bits differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = measure(arguments.swaps, arguments.clients)
    table = Table("figure", "value")
    for name, value in result.items():
        if name != "memory_bytes_after_each":
            table.add_row(name, str(value))
    Console().print(table)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    is_good = (
        not result["n_failed"] and result["n_sets_of_bits"] == 1 and result["n_versions_seen"] == arguments.swaps + 1
    )
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
