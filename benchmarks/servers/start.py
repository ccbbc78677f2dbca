"""Start each server with the same graph, wait until it is ready, and end it with all its children.

Where a server leaves a choice, it is made in its favour: Triton and MLServer run the graph in the process that they have for it, and plain
BentoML has one worker. Each is started from files that are written to a scratch folder.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.raw_http import wait_until_ready
from benchmarks.servers.served import Running, Served
from tests.end_to_end.server import Server, free_port, free_ports

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def cellserve(served: Served, **settings: str) -> Iterator[Running]:
    """Our server; `settings` are environment variables."""
    server = Server(served.store, CELLSERVE_PROVIDER=served.provider, **settings)
    try:
        started = time.perf_counter()
        process = server.start().process
        assert process is not None

        def check() -> None:
            if process.poll() is not None:
                raise RuntimeError(server.log())

        wait_until_ready(server.port, "/readyz", check)
        yield Running(server.port, process.pid, time.perf_counter() - started)
        server.stop()
    finally:
        server.close()


@contextmanager
def plain_bentoml(served: Served) -> Iterator[Running]:
    """BentoML with the service of plain_bento.py, in the environment of our own server."""
    python = Path(os.environ["CELLSERVE_TEST_SERVER_PYTHON"]).absolute()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "BENCHMARK_GRAPH": str(served.graph),
            "BENCHMARK_PROVIDER": served.onnx_provider,
            "BENTOML_HOME": folder,
            "BENTOML_DO_NOT_TRACK": "true",
        }
        command = [python, "-m", "bentoml", "serve", "benchmarks.servers.plain_bento:Plain"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with running(command, environment, port, "/readyz", Path(folder)) as server:
            yield server


@contextmanager
def mlserver(served: Served) -> Iterator[Running]:
    """MLServer with the runtime of mlserver_runtime.py; REST only, without worker processes, as it is fastest for a small model."""
    port, grpc_port, metrics_port = free_ports(3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "host": "127.0.0.1",
            "http_port": port,
            "grpc_port": grpc_port,
            "metrics_port": metrics_port,
            "parallel_workers": 0,
            "debug": False,
        }
        model = {
            "name": "encode",
            "implementation": "benchmarks.servers.mlserver_runtime.GraphRuntime",
            "parameters": {"uri": str(served.graph), "extra": {"provider": served.onnx_provider}},
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(json.dumps(model))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [served.python.parent / "mlserver", "start", folder]
        with running(command, environment, port, "/v2/health/ready", folder) as server:
            yield server


@contextmanager
def triton(served: Served) -> Iterator[Running]:
    """The server of PyPI's nvidia-pytriton with the Python backend and a plain model.py."""
    packages = next((served.python.parent.parent / "lib").glob("python3*/site-packages"))
    home = packages / "pytriton/tritonserver"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = folder / "models/encode/1"
        version.mkdir(parents=True)
        shutil.copy(served.graph, version / "encode.onnx")
        code = (ROOT / "benchmarks/servers/triton_model.py").read_text()
        # The interpreter inside Triton knows neither PYTHONPATH nor the virtual environment.
        (version / "model.py").write_text(f"import sys\nsys.path.insert(0, {str(packages)!r})\n{code}")
        (version.parent / "config.pbtxt").write_text(
            f'name: "encode" backend: "python" max_batch_size: 2048\n'
            f'input [{{name: "counts" data_type: TYPE_FP32 dims: [{served.n_genes}]}}]\n'
            f'output [{{name: "latent" data_type: TYPE_FP32 dims: [{served.n_latent}]}}]\n'
            f'parameters {{key: "provider" value: {{string_value: "{served.onnx_provider}"}}}}\n'
            "instance_group [{kind: KIND_CPU count: 1}]\ndynamic_batching {}\n"
        )
        # The stub of this Python lies beside the backends, not among them. Links, because each finds its libraries from where it really lies.
        backend = folder / "backends/python"
        backend.mkdir(parents=True)
        stubs = home / "python_backend_stubs" / packages.parent.name.removeprefix("python")
        for file in (*(home / "backends/python").iterdir(), *stubs.iterdir()):
            (backend / file.name).symlink_to(file)
        where = [served.python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
        library = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
        port = free_port()
        environment = {**os.environ, "LD_LIBRARY_PATH": library, "PYTHONPATH": str(packages)}
        command = [
            home / "bin/tritonserver",
            f"--model-repository={folder}/models",
            f"--backend-directory={folder}/backends",
            f"--http-port={port}",
            "--allow-grpc=false",
            "--allow-metrics=false",
            "--http-thread-count=4",
        ]
        with running(command, environment, port, "/v2/health/ready", folder) as server:
            yield server


SERVERS = {"cellserve": cellserve, "triton": triton, "mlserver": mlserver, "plain_bentoml": plain_bentoml}


@contextmanager
def running(command: list[Any], environment: dict[str, str], port: int, ready: str, folder: Path) -> Iterator[Running]:
    """A server process once it answers; ended with all its children.

    Raises:
        RuntimeError: it ended; with its log.
        TimeoutError: it was not ready within two minutes.
    """
    log = folder / "log"
    with log.open("wb") as output:
        started = time.perf_counter()
        # A group of its own: an interrupt from the keyboard reaches it through `end` only.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )

    def check() -> None:
        if process.poll() is not None:
            raise RuntimeError(log.read_text(errors="replace"))

    try:
        wait_until_ready(port, ready, check)
        yield Running(port, process.pid, time.perf_counter() - started)
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a process to end, and its children with it; then by force."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    for child in psutil.wait_procs(family, timeout=5)[1]:
        child.kill()
    process.kill()
    process.wait(5)


@contextmanager
def paused(pids: Iterable[int]) -> Iterator[None]:
    """Stop processes and their children while another is measured: servers that have nothing to do wake up now and then, and it shows."""
    processes = [process for pid in pids for process in _family(pid)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def _family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process and its children: resident, and with shared pages divided among those who share them."""
    found = [process.memory_full_info() for process in _family(pid)]
    return {"rss": sum(one.rss for one in found), "pss": sum(one.pss for one in found)}
