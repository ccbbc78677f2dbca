"""Bodies and answers that are whole files: on disk within bounds, read and written by processes of their own (file_processes.py)."""

import asyncio
import contextlib
import errno
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.disconnect import cancelled_on_disconnect
from service.api.limits import Intake
from service.api.stages import until_queue
from service.cells.counts import csr
from service.cells.file_processes import FileProcess, FileProcesses, Limits
from service.cells.formats.format import check_names
from service.cells.formats.h5ad import Places
from service.errors import (
    AnswerNotWritten,
    FileNeedsTooMuch,
    FileReaderEnded,
    InvalidCells,
    InvalidOption,
    NoDiskSpace,
    RequestTimeout,
)
from service.inference.gathered import Gathered
from service.inference.model import Model
from service.inference.query import Query

N_PROCESSES = 2
"""Files that are read or written at a time; more wait."""

PIECE_BYTES = 2**18
T = TypeVar("T")


@dataclass
class Uploads:
    """What a process takes in as files. Belongs to one event loop."""

    intake: Intake
    """Bounds of one file and of all files at a time, what they decompress to and answers included."""

    max_cells: int
    parse_seconds: float
    parse_memory_bytes: int
    directory: Path | None = None
    """Of the files, which have no names there; the system's own for such files by default."""

    _processes: FileProcesses = field(default_factory=FileProcesses)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(N_PROCESSES, thread_name_prefix="cellserve-file")
    )

    @contextlib.asynccontextmanager
    async def query(
        self, request: Request, model: Model, places: Places
    ) -> AsyncIterator[tuple[Query, dict[str, float]]]:
        """The cells of a body, ready for the model, and the seconds that reading them took.

        The block is cancelled where the client leaves. The file counts as held until its cells are read, and they until they are forgotten.

        Raises:
            CellserveError: as Intake.spool says, what is wrong with the file or its cells, and NoDiskSpace.
        """
        began = time.monotonic()
        with self._files(3) as (upload, counts, columns), _no_space():
            async with self.intake.spool(request, upload), cancelled_on_disconnect(request):
                received = time.monotonic()
                with self._files(1) as (scratch,):
                    query = await self._in_thread(
                        lambda process: self._read(process, upload, scratch, (counts, columns), model, places)
                    )
                n_bytes = counts.tell() + columns.tell()
                self.intake.hold(n_bytes)
                weakref.finalize(query, self.intake.release, n_bytes)
                upload.truncate(0)
                yield query, until_queue(began, received, {"parse": time.monotonic() - received})

    async def respond(
        self, pieces: AsyncGenerator[bytes], headers: dict[str, str], media_type: str, limit_seconds: float
    ) -> Response:
        """The file that is made of the pieces of an answer, when all have come.

        Args:
            pieces: what the format's writer writes.
            headers: of the answer.
            media_type: of the answer.
            limit_seconds: that the client may take to read a piece.

        Raises:
            TooManyBytes: there is no room for it.
            NoDiskSpace: there is none on the disk.
            AnswerNotWritten: the process that was to write it ended.
        """
        n_held = 0
        loop = asyncio.get_running_loop()
        with _no_space():
            answer = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 - closed by the response, which outlives this
            try:
                with self._files(1) as (spooled,):
                    async for piece in pieces:
                        # What is written, and the file that is made of it.
                        self.intake.hold(2 * len(piece))
                        n_held += 2 * len(piece)
                        await loop.run_in_executor(None, spooled.write, piece)
                    await self._in_thread(lambda process: self._write(process, spooled, answer))
                response = _OpenFile(answer, headers, media_type, limit_seconds)
            except BaseException:
                answer.close()
                self.intake.release(n_held)
                raise
            weakref.finalize(response, self.intake.release, n_held)
            return response

    def close(self) -> None:
        """End the processes and threads."""
        self._processes.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def _files(self, number: int) -> Iterator[tuple[IO[bytes], ...]]:
        """Empty files without a name, so that nothing is left of them whatever happens."""
        with contextlib.ExitStack() as stack:
            yield tuple(stack.enter_context(tempfile.TemporaryFile(dir=self.directory)) for _ in range(number))

    async def _in_thread(self, work: Callable[[FileProcess], T]) -> T:
        """Give a process to a function in a thread; where nobody waits for it any more, the process is ended."""
        is_cancelled = False
        leased: list[FileProcess] = []
        lock = threading.Lock()  # what has been given back is another's, and must not be ended

        def run() -> T:
            with self._processes.lease() as process:
                with lock:
                    leased.append(process)
                try:
                    if is_cancelled:
                        raise FileReaderEnded(reason="nobody waits for it any more")
                    return work(process)
                finally:
                    with lock:
                        leased.clear()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except asyncio.CancelledError:
            with lock:
                is_cancelled = True
                for process in leased:
                    process.kill()
            raise

    def _read(
        self,
        process: FileProcess,
        upload: IO[bytes],
        scratch: IO[bytes],
        files: tuple[IO[bytes], IO[bytes]],
        model: Model,
        places: Places,
    ) -> Query:
        """The query of a file. What comes from the process is checked as what comes from a client is: it has read a stranger's file."""
        job: dict[str, Any] = {
            "job": "read",
            "max_cells": self.max_cells,
            "max_decoded_bytes": self.intake.max_body_bytes,
            **places.model_dump(),
        }
        received = process.run(job, upload, scratch, self._limits())
        head, _ = next(received, ({}, []))
        genes, cell_ids = check_names(head.get("genes"), "genes"), check_names(head.get("cell_ids"), "cell_ids")
        gathered = Gathered(model, genes, cell_ids, files)
        place = str(head.get("place"))[:300]
        for _, arrays in received:
            if len(arrays) != 3:
                raise FileReaderEnded(reason="it does not answer as it should")
            indptr, indices, values = arrays
            if (
                len(indptr) < 2
                or indptr[0] != 0
                or indptr[-1] != len(indices)
                or len(indices) != len(values)
                or (np.diff(indptr.astype(np.int64)) < 0).any()
            ):
                raise FileReaderEnded(reason="it does not answer as it should")
            if len(indices) and (indices.min() < 0 or indices.max() >= len(genes)):
                raise InvalidCells(problem=f"'{place}' names a column beyond the {len(genes):,} genes of its var.")
            gathered.add(csr(values, indices, indptr, len(genes)))
        return gathered.query(place)

    def _write(self, process: FileProcess, spooled: IO[bytes], answer: IO[bytes]) -> None:
        spooled.flush()
        try:
            for _ in process.run({"job": "write"}, spooled, answer, self._limits()):
                pass
        except (FileReaderEnded, FileNeedsTooMuch) as error:
            raise AnswerNotWritten(reason=error.detail) from None

    def _limits(self) -> Limits:
        return Limits(self.parse_seconds, self.parse_memory_bytes, 4 * self.intake.max_body_bytes)


def read_places(values: Mapping[str, str]) -> Places:
    """The options of a body as a person wrote them, checked.

    Raises:
        InvalidOption: one has a value that is not allowed.
    """
    try:
        return Places.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "layer"
        raise InvalidOption(name=name, problem=f"{first['msg']}.") from None


class _OpenFile(Response):
    """Sends a file from disk, as the client reads it, and gives up on a client that does not. Closes it with itself."""

    def __init__(self, file: IO[bytes], headers: dict[str, str], media_type: str, limit_seconds: float) -> None:
        self._file, self._limit_seconds = file, limit_seconds
        self._n_bytes = file.seek(0, 2)
        super().__init__(None, headers={**headers, "Content-Length": str(self._n_bytes)}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send all of it.

        Raises:
            RequestTimeout: the client has stopped reading.
        """
        loop = asyncio.get_running_loop()
        with self._file as file:
            file.seek(0)
            n_left = self._n_bytes
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while n_left:
                piece = await loop.run_in_executor(None, file.read, PIECE_BYTES)
                n_left -= len(piece)
                try:
                    async with asyncio.timeout(self._limit_seconds):
                        await send({"type": "http.response.body", "body": piece, "more_body": bool(n_left)})
                except TimeoutError:
                    raise RequestTimeout(limit_seconds=self._limit_seconds) from None


@contextlib.contextmanager
def _no_space() -> Iterator[None]:
    """Where the disk is full, say so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoDiskSpace from None
        raise
