"""Embedding over HTTP: cellserve, Triton (Python backend) and plain BentoML with the same graph, the same cells and the same clients.

    make bench-servers

Each server runs alone, clients share its CPUs, requests are prepared before the clock starts, and every answer is read whole. Rounds go
in turns. Triton gets dense FP32 tensors by tritonclient in binary; plain BentoML gets dense arrays in JSON; cellserve gets what its own
client sends. One cell is asked for at a fixed rate, whether or not the last answer has come (open loop).
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.embed_http import ARROW, ROOT, query_cells
from benchmarks.machine import machine
from service.client import bodies
from service.contract import artifact
from service.contract.store import Store
from service.inference.model import Model, load
from service.inference.session import choose_runtime
from tests.end_to_end.server import Server, free_port

RESULT = Path(__file__).with_suffix(".json")
CELLS = 256
CLIENTS = (1, 8)
RATE = 100
"""Requests of one cell a second."""

Ask = Callable[[], None]


@contextlib.contextmanager
def cellserve(_python: Path, model: Model) -> Iterator[tuple[Callable[[int], Ask], int]]:
    """Our server; gives a maker of askers by number of cells, and the process."""
    counts, genes = query_cells(model)
    server = Server(ROOT / "models_store")
    try:
        server.start().wait_until_ready()

        def asker(size: int) -> Ask:
            client = httpx.Client(base_url=server.url, timeout=60)
            body = next(bodies(counts[:size], list(genes), size))
            return lambda: client.post("/v1/embed?model=pbmc", content=body, headers=ARROW).raise_for_status() and None

        yield asker, server.process.pid
    finally:
        server.close()


@contextlib.contextmanager
def triton(python: Path, model: Model) -> Iterator[tuple[Callable[[int], Ask], int]]:
    """The server of PyPI's nvidia-pytriton with a plain model.py."""
    import tritonclient.http as triton_client

    dense = dense_cells(model)
    packages = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    home = packages / "pytriton/tritonserver"
    with (
        tempfile.TemporaryDirectory() as folder,
        process_of_triton(python, home, packages, Path(folder), model) as (pid, port),
    ):

        def asker(size: int) -> Ask:
            client = triton_client.InferenceServerClient(f"127.0.0.1:{port}")
            counts = triton_client.InferInput("counts", [size, dense.shape[1]], "FP32")
            counts.set_data_from_numpy(dense[:size], binary_data=True)
            wanted = [triton_client.InferRequestedOutput("latent", binary_data=True)]

            def ask() -> None:
                assert client.infer("encode", [counts], outputs=wanted).as_numpy("latent").shape[0] == size

            return ask

        yield asker, pid


@contextlib.contextmanager
def process_of_triton(
    python: Path, home: Path, packages: Path, folder: Path, model: Model
) -> Iterator[tuple[int, int]]:
    """A ready Triton; its process and port."""
    version = folder / "models/encode/1"
    version.mkdir(parents=True)
    store = Store(ROOT / "models_store")
    shutil.copy(store.path(store.resolve("pbmc")) / "encode.onnx", version)
    code = (ROOT / "benchmarks/servers/triton_model.py").read_text()
    # The interpreter inside Triton knows neither PYTHONPATH nor the virtual environment.
    (version / "model.py").write_text(f"import sys\nsys.path.insert(0, {str(packages)!r})\n{code}")
    (version.parent / "config.pbtxt").write_text(
        f'name: "encode" backend: "python" max_batch_size: 2048\n'
        f'input [{{name: "counts" data_type: TYPE_FP32 dims: [{model.manifest.genes.n_genes}]}}]\n'
        f'output [{{name: "latent" data_type: TYPE_FP32 dims: [{model.manifest.n_latent}]}}]\n'
        "instance_group [{kind: KIND_CPU count: 1}]\ndynamic_batching {}\n"
    )
    # The stub of this Python lies beside the backends, not among them. Links, because each finds its libraries from where it really lies.
    backend = folder / "backends/python"
    backend.mkdir(parents=True)
    stubs = home / "python_backend_stubs" / packages.parent.name.removeprefix("python")
    for file in (*(home / "backends/python").iterdir(), *stubs.iterdir()):
        (backend / file.name).symlink_to(file)
    library = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    port = free_port()
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": library,
        "PYTHONPATH": str(packages),
    }
    command = [
        home / "bin/tritonserver",
        f"--model-repository={folder}/models",
        f"--backend-directory={folder}/backends",
    ]
    command += [f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false", "--http-thread-count=4"]
    yield from running(command, environment, port, "/v2/health/ready", folder / "log")


@contextlib.contextmanager
def plain_bentoml_json(_python: Path, model: Model) -> Iterator[tuple[Callable[[int], Ask], int]]:
    """BentoML's JSON of nested lists."""
    with plain_bentoml(model) as (url, pid):
        dense = dense_cells(model)

        def asker(size: int) -> Ask:
            client = httpx.Client(base_url=url, timeout=60)
            body = json.dumps({"counts": dense[:size].astype(int).tolist()}).encode()
            headers = {"Content-Type": "application/json"}
            return lambda: client.post("/encode", content=body, headers=headers).raise_for_status() and None

        yield asker, pid


@contextlib.contextmanager
def plain_bentoml(model: Model) -> Iterator[tuple[str, int]]:
    """A ready plain BentoML; its address and process."""
    store = Store(ROOT / "models_store")
    python = os.environ.get("CELLSERVE_TEST_SERVER_PYTHON", "python")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "ENCODE_GRAPH": str(store.path(store.resolve(model.manifest.name)) / "encode.onnx"),
            "BENTOML_HOME": folder,
            "BENTOML_DO_NOT_TRACK": "true",
        }
        command = [Path(python).absolute(), "-m", "bentoml", "serve", "benchmarks.servers.plain_bento:Plain"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with contextlib.contextmanager(running)(command, environment, port, "/readyz", Path(folder) / "log") as (
            pid,
            _,
        ):
            yield f"http://127.0.0.1:{port}", pid


def running(
    command: list[Any], environment: dict[str, str], port: int, ready: str, log: Path
) -> Iterator[tuple[int, int]]:
    """A server process that answers; ended with all its children."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}{ready}").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process.pid, port
    finally:
        if process.poll() is None:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            process.terminate()
            for child in psutil.wait_procs(family, timeout=15)[1]:
                child.kill()


def dense_cells(model: Model) -> np.ndarray:
    """CELLS real cells over the model's genes in its order, float32."""
    from service.cells.counts import Cells
    from service.inference.query import prepare

    counts, genes = query_cells(model)
    return prepare(model, Cells(genes=genes, counts=counts[:CELLS])).counts.toarray()


def side_by_side(
    asker: Callable[[int], Ask], size: int, n_clients: int, work: Callable[[int, Ask, float], None]
) -> float:
    """Run `work(number, ask, begin)` for so many clients, each in a thread with a connection of its own; seconds from begin to end."""
    barrier = threading.Barrier(n_clients + 1)
    begin = [0.0]

    def run(number: int) -> None:
        ask = asker(size)  # in this thread: tritonclient's connections belong to the thread that made them
        ask()
        barrier.wait()
        barrier.wait()
        work(number, ask, begin[0])

    with ThreadPoolExecutor(n_clients) as pool:
        jobs = [pool.submit(run, number) for number in range(n_clients)]
        barrier.wait(60)
        begin[0] = time.perf_counter()
        barrier.wait()
        for job in jobs:
            job.result()
        return time.perf_counter() - begin[0]


def throughput(asker: Callable[[int], Ask], n_clients: int, seconds: float) -> float:
    """Cells a second of so many clients, each with one request at a time."""
    numbers = [0] * n_clients

    def work(number: int, ask: Ask, begin: float) -> None:
        while time.perf_counter() < begin + seconds:
            ask()
            numbers[number] += 1

    spent = side_by_side(asker, CELLS, n_clients, work)
    return CELLS * sum(numbers) / spent


def latencies(asker: Callable[[int], Ask], seconds: float) -> list[float]:
    """Seconds from when each request was due to its answer, at RATE a second over 4 connections."""
    n_clients = 4
    spent: list[float] = []

    def work(number: int, ask: Ask, begin: float) -> None:
        for turn in range(number, int(RATE * seconds), n_clients):
            due = begin + turn / RATE
            time.sleep(max(0.0, due - time.perf_counter()))
            ask()
            spent.append(time.perf_counter() - due)

    side_by_side(asker, 1, n_clients, work)
    return spent


SIDES = {"cellserve": cellserve, "triton": triton, "plain BentoML, JSON": plain_bentoml_json}


def main() -> None:
    """Measure all sides in turns, print, and write the result beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--triton-python", type=Path, required=True, help="interpreter with nvidia-pytriton and onnxruntime"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    store = Store(ROOT / "models_store")
    model = load(artifact.read(store.path(store.resolve("pbmc"))), choose_runtime("cpu", None, False))
    measured: dict[str, dict[str, list[float]]] = {
        side: {key: [] for key in (*(f"{n}_clients" for n in CLIENTS), "p50_ms", "p99_ms", "memory_mb")}
        for side in SIDES
    }
    for _ in range(options.rounds):
        for side, serve in SIDES.items():
            with serve(options.triton_python, model) as (asker, pid):
                for n_clients in CLIENTS:
                    measured[side][f"{n_clients}_clients"].append(throughput(asker, n_clients, options.seconds))
                spent = latencies(asker, options.seconds)
                measured[side]["p50_ms"].append(1e3 * float(np.quantile(spent, 0.5)))
                measured[side]["p99_ms"].append(1e3 * float(np.quantile(spent, 0.99)))
                processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
                measured[side]["memory_mb"].append(sum(p.memory_full_info().pss for p in processes) / 1e6)
    result = {
        "machine": machine(),
        "n_genes": model.manifest.genes.n_genes,
        "cells_per_request": CELLS,
        "rate": RATE,
        "rounds": options.rounds,
        "sides": {
            side: {key: round(statistics.median(found), 2) for key, found in values.items()}
            for side, values in measured.items()
        },
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("", *SIDES)
    for key in next(iter(result["sides"].values())):
        table.add_row(key, *(f"{result['sides'][side][key]:,}" for side in SIDES))
    Console().print(table)


if __name__ == "__main__":
    main()
