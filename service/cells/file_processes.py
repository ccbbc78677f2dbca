"""Processes that read and write HDF5 files for this one (see hdf5/process.py): started at need, kept, and replaced when one ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from service import errors, metrics
from service.cells.hdf5 import messages
from service.errors import CellserveError, FileNeedsTooMuch, FileReaderEnded

_ROOT = Path(__file__).parents[2]
"""Of the package `service`."""

# No secret and no setting of the server; nothing that makes HDF5 load code, lock files or numpy start threads.
_ENVIRONMENT = {
    "PYTHONPATH": str(_ROOT),
    "HDF5_PLUGIN_PRELOAD": "::",
    "HDF5_USE_FILE_LOCKING": "FALSE",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
_INHERITED = ("PATH", "LANG", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")

_KNOWN = {
    error.code: error
    for error in (
        errors.FileRefused,
        errors.FileTooLarge,
        errors.InvalidCells,
        errors.InvalidOption,
        errors.MalformedBody,
        errors.NoCells,
        errors.NoRawCounts,
        errors.TooManyCells,
    )
}
"""What such a process may say is wrong with a file, by code."""


@dataclass(frozen=True)
class Limits:
    """Of one file."""

    seconds: float
    """Of time on the CPU, and on the clock."""

    memory_bytes: int
    """Address space of the process."""

    file_bytes: int
    """Of what it may write."""


class FileProcess:
    """One process. Belongs to one thread at a time, apart from `kill`."""

    def __init__(self) -> None:
        """Start it."""
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.cells.hdf5.process"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**environment, **_ENVIRONMENT},
                cwd="/",
                start_new_session=True,
            )
        self._socket = ours
        self.is_busy = False
        """Whether a job has not come to its end, so that something of it may still be on its way."""

    def run(
        self, job: dict[str, Any], source: IO[bytes], target: IO[bytes], limits: Limits
    ) -> Iterator[messages.Message]:
        """What it sends about a job, message by message, without the last one.

        Args:
            job: "job", read or write, and what that needs.
            source: the file to read.
            target: an empty file to write to.
            limits: of this job.

        Raises:
            CellserveError: what it found wrong with the file.
            FileNeedsTooMuch: it went beyond a limit.
            FileReaderEnded: it ended.
            OSError: it could not write to `target`.
        """
        self.is_busy = True
        deadline = time.monotonic() + limits.seconds
        bounds = {"memory_bytes": limits.memory_bytes, "cpu_seconds": limits.seconds, "file_bytes": limits.file_bytes}

        def read(n_bytes: int) -> bytes:
            content = bytearray(n_bytes)
            view, n_read = memoryview(content), 0
            while n_read < n_bytes:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                if not (n_more := self._socket.recv_into(view[n_read:])):
                    break
                n_read += n_more
            return bytes(view[:n_read])

        try:
            request = messages.pack({**job, **bounds})
            self._socket.settimeout(limits.seconds)
            n_sent = socket.send_fds(self._socket, [request], [source.fileno(), target.fileno()])
            self._socket.sendall(request[n_sent:])
            while True:
                received = messages.unpack(read)
                if received is None:
                    raise self._ended(limits)
                head, arrays = received
                self.is_busy = not ("code" in head or head.get("is_end"))
                if "code" in head:
                    raise _error(head)
                if head.get("is_out_of_memory"):
                    metrics.FILE_PROCESSES_ENDED.inc()
                    raise FileNeedsTooMuch(limit=limits.memory_bytes, unit="bytes of memory")
                if "errno" in head:
                    raise OSError(int(head["errno"]), "the process that writes files")
                if head.get("is_end"):
                    return
                yield head, arrays
        except TimeoutError:
            metrics.FILE_PROCESSES_ENDED.inc()
            raise FileNeedsTooMuch(limit=round(limits.seconds), unit="seconds") from None
        except (messages.BrokenMessage, ConnectionError):
            raise self._ended(limits) from None

    def kill(self) -> None:
        """End it at once; whoever waits for it is told."""
        self._process.kill()

    def close(self) -> None:
        """End it and forget it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it can take a job."""
        return self._process.poll() is None

    def _ended(self, limits: Limits) -> CellserveError:
        metrics.FILE_PROCESSES_ENDED.inc()
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return FileReaderEnded(reason="it does not answer as it should")
        if status == -signal.SIGXCPU:
            return FileNeedsTooMuch(limit=round(limits.seconds), unit="seconds")
        return FileReaderEnded(reason=signal.Signals(-status).name if status < 0 else f"status {status}")


class FileProcesses:
    """As many processes as are in use at a time."""

    def __init__(self) -> None:
        """Start none yet."""
        self._idle: list[FileProcess] = []
        self._in_use: set[FileProcess] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    @contextlib.contextmanager
    def lease(self) -> Iterator[FileProcess]:
        """A process for one job. It is kept for the next where the job came to its end."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is not None and not process.is_alive:
            process.close()
            process = None
        process = process or FileProcess()
        with self._lock:
            self._in_use.add(process)
        try:
            yield process
        finally:
            with self._lock:
                self._in_use.discard(process)
                if is_kept := not process.is_busy and not self._is_closed:
                    self._idle.append(process)
            if not is_kept:
                process.close()

    def close(self) -> None:
        """End all; whoever waits for one is told."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for process in self._in_use:
                process.kill()
        for process in idle:
            process.close()


def _error(head: dict[str, Any]) -> CellserveError:
    """The error that a process reports; what it may say is known."""
    with contextlib.suppress(TypeError, KeyError):
        return _KNOWN[head["code"]](**head["members"])
    return FileReaderEnded(reason="it does not answer as it should")
