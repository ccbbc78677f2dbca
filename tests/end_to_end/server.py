"""A real server for tests, examples and benchmarks: `bentoml serve` in a process of its own, on a free port."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent.parent
PYTHON = "CELLSERVE_TEST_SERVER_PYTHON"
"""Environment variable with the interpreter that serves; `make test` names the one of the environment without torch."""


class Server:
    """One server process. `start` returns at once; `wait_until_ready` waits."""

    service = "service.app:CellServe"

    def __init__(self, store: Path, **environment: str | None) -> None:
        """Make a server of the models in `store`; further arguments are environment variables, None for one that is not set."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._home = tempfile.TemporaryDirectory(prefix="cellserve-test-")
        self._log = Path(self._home.name) / "log"
        python = os.environ.get(PYTHON, sys.executable)
        # What the caller's shell sets must not reach the server, nor must our own coverage of prometheus files.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CELLSERVE_", "PROMETHEUS_", "BENTOML_"))
        }
        wanted: dict[str, str | None] = {
            **inherited,
            "CELLSERVE_STORE": str(store),
            "BENTOML_HOME": self._home.name,
            "BENTOML_DO_NOT_TRACK": "true",
            **environment,
        }
        self._environment = {name: value for name, value in wanted.items() if value is not None}
        # Not resolved: the name of a virtual environment's interpreter is what makes it one.
        self._command = [str(Path(python).absolute()), "-m", "bentoml", "serve", self.service]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Server":
        """Start the process."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def wait_until(self, path: str, seconds: float = 60) -> httpx.Response:
        """The first answer with status 200 of `path`.

        Raises:
            AssertionError: the process ended, or there was none in time; with the log.
        """
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(self.url + path, timeout=5)
                if answer.status_code == 200:
                    return answer
            time.sleep(0.1)
        raise AssertionError(f"{path} did not answer 200 within {seconds} s:\n{self.log()}")

    def wait_until_ready(self) -> "Server":
        """Wait for /readyz."""
        self.wait_until("/readyz")
        return self

    def stop(self, seconds: float = 30) -> int:
        """Send SIGTERM and wait; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not stop within {seconds} s:\n{self.log()}") from None

    def metric(self, pattern: str) -> float:
        """The sum of the series of /metrics whose name and labels match a regular expression; 0 where none does."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE))

    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def close(self) -> None:
        """End all its processes, if need be by force, and remove its files."""
        if self.process is not None and self.process.poll() is None:
            # Asked for now: once the parent is gone nobody knows its workers.
            workers = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            _, alive = psutil.wait_procs(workers, timeout=10)
            for worker in alive:
                worker.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self.process.kill()
            self.process.wait(5)
        self._home.cleanup()


@contextlib.contextmanager
def running_server(store: Path, **environment: str) -> Iterator[str]:
    """The URL of a ready server of the models in `store`."""
    server = Server(store, **environment)
    try:
        server.start().wait_until_ready()
        yield server.url
        server.stop()
    finally:
        server.close()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition, which is asked in a thread: one that asks the server would hold up the clients of this event loop.

    Raises:
        AssertionError: it did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    return free_ports(1)[0]


def free_ports(n: int) -> list[int]:
    """Different ports of the loopback interface that nothing listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
