"""A container for tests and benchmarks: started with the options of `make run-image`, reached inside its own network namespace."""

import contextlib
import ctypes
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

IMAGE = "CELLSERVE_TEST_IMAGE"
ENGINE = "CELLSERVE_TEST_ENGINE"
RUN_OPTIONS = "CELLSERVE_TEST_RUN_OPTIONS"
MEMORY = "512m"
URL = "http://127.0.0.1:3000"
_CLONE_NEWNET = 0x40000000


def engine(*arguments: str, seconds: float = 120) -> str:
    """What the container engine prints.

    Raises:
        AssertionError: it failed; with what it said.
    """
    command = [*shlex.split(os.environ.get(ENGINE, "docker")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def image() -> str:
    """The image under test."""
    return os.environ[IMAGE]


def image_config(name: str) -> dict[str, Any]:
    """What the engine knows of an image."""
    config: dict[str, Any] = json.loads(engine("inspect", "--type", "image", name))[0]
    return config


class Container:
    """One container without a network but loopback, its memory limited, all else as `make run-image` has it."""

    def __init__(self, *options: str, name: str | None = None) -> None:
        """Start a container of `name` (the image under test); further arguments are options of `run`."""
        self.started = time.monotonic()
        given = shlex.split(os.environ.get(RUN_OPTIONS, ""))
        self.id = engine("run", "-d", "--network", "none", "--memory", MEMORY, *given, *options, name or image())

    @property
    def state(self) -> dict[str, Any]:
        """Running, Pid, ExitCode and so on."""
        state: dict[str, Any] = json.loads(engine("inspect", "--type", "container", self.id))[0]["State"]
        return state

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """This thread, and threads that it starts meanwhile, reach the container's loopback and nothing else. Needs root."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(path: str) -> None:
            with Path(path).open() as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise PermissionError(ctypes.get_errno(), "root is needed to enter a container's network", path)

        with Path("/proc/thread-self/ns/net").open() as before:
            enter(f"/proc/{self.state['Pid']}/ns/net")
            try:
                yield
            finally:
                assert libc.setns(before.fileno(), _CLONE_NEWNET) == 0

    def run(self, *command: str) -> str:
        """What a command inside prints."""
        return engine("exec", self.id, *command)

    def wait_until_ready(self, seconds: float = 60) -> "Container":
        """Wait for /readyz.

        Raises:
            AssertionError: it ended, or was not ready in time; with its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.state["Running"], f"ended with {self.state['ExitCode']}:\n{self.log()}"
            with self.network(), contextlib.suppress(httpx.TransportError):
                if httpx.get(URL + "/readyz", timeout=5).status_code == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(f"not ready within {seconds} s:\n{self.log()}")

    def log(self) -> str:
        """What it has written to both streams."""
        command = [*shlex.split(os.environ.get(ENGINE, "docker")), "logs", self.id]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def close(self) -> None:
        """Remove it, running or not."""
        engine("rm", "-f", "-t", "0", self.id) if "podman" in os.environ.get(ENGINE, "") else engine(
            "rm", "-f", self.id
        )


@contextlib.contextmanager
def running(*options: str, name: str | None = None) -> Iterator[Container]:
    """A ready container; arguments as of `Container`."""
    container = Container(*options, name=name)
    try:
        yield container.wait_until_ready()
    finally:
        container.close()
