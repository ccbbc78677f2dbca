"""The process that alone has to do with HDF5: `python -m service.cells.hdf5.process`, its standard input a socket to the server.

A file that somebody sends may crash what reads it. Here that ends a process without secrets, which can open nothing while it reads, has a bound
on its memory, time and files, and is started anew.
"""

import codecs
import contextlib
import errno
import math
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from service.cells.hdf5 import answer_file, messages
from service.cells.hdf5.anndata_file import AnnDataFile
from service.cells.hdf5.plain import PlainFile
from service.errors import CellserveError, MalformedBody

CHUNK_CACHE_BYTES = 32 * 2**20
"""Decompressed chunks that HDF5 keeps: rows of a dense matrix lie in several."""


def main() -> None:
    """Do one job after the other, until the server closes the socket."""
    server = socket.socket(fileno=0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where memory runs out, this is to go and not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    while True:
        message, files, _, _ = socket.recv_fds(server, 4, 2)
        if not message:
            return
        rest = message

        def read(n_bytes: int) -> bytes:
            nonlocal rest
            content, rest = rest[:n_bytes], rest[n_bytes:]
            while len(content) < n_bytes and (more := server.recv(n_bytes - len(content))):
                content += more
            return content

        received = messages.unpack(read)
        if received is None:
            return
        job = received[0]
        # Files of their own: without a buffer, closed with them.
        source, target = os.fdopen(files[0], "r+b", buffering=0), os.fdopen(files[1], "r+b", buffering=0)
        with source, target:
            _limit(job)
            try:
                for sent in _read(job, source, target) if job["job"] == "read" else _write(source, target):
                    server.sendall(sent)
            except ConnectionError:  # the server is gone
                return
            except MemoryError:
                server.sendall(messages.pack({"is_out_of_memory": True}))
                return
            except OSError as error:
                # Of the files that are written: the disk is full, or they are longer than they may be.
                server.sendall(messages.pack({"errno": error.errno or 0}))
                return


def _limit(job: dict[str, Any]) -> None:
    """Set the bounds of a job: address space, time on the CPU, length of files."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(usage.ru_utime + usage.ru_stime + job["cpu_seconds"])
    for kind, bound in (
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
    ):
        # Where the system or an administrator bounds it more tightly, that holds.
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


@contextlib.contextmanager
def _nothing_else_opened() -> Iterator[None]:
    """Within it this process can open no file, whatever a file in its hands refers to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _read(job: dict[str, Any], source: Any, scratch: Any) -> Iterator[bytes]:
    """The cells of a file: what they are called, then some rows at a time, then that this was all; or what is wrong."""
    plain = None
    try:
        with _nothing_else_opened(), h5py.File(source, "r", rdcc_nbytes=CHUNK_CACHE_BYTES) as file:
            plain = PlainFile(file, job["max_decoded_bytes"])
            adata = AnnDataFile(plain, job["max_cells"])
            matrix, place = adata.counts(job["layer"], job["use_raw"])
            genes = adata.genes(place, job["gene_key"])
            yield messages.pack({"genes": genes, "cell_ids": adata.cell_ids(), "place": place})
            for block in matrix.blocks(scratch.fileno()):
                yield messages.pack({}, [block.indptr, block.indices, block.values])
            yield messages.pack({"is_end": True})
    except CellserveError as error:
        yield messages.pack({"code": error.code, "members": error.members()})
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if "alloc" in str(error):  # HDF5 has errors of its own for it
            raise MemoryError from error
        where = f" at '{plain.at}'" if plain is not None else ""
        problem = f"The file is no HDF5 file, cut off or damaged{where}: {str(error)[:200]}."
        yield messages.pack({"code": MalformedBody.code, "members": {"problem": problem}})


def _write(source: Any, target: Any) -> Iterator[bytes]:
    """Write an answer; says when it is done."""
    source.seek(0)
    with h5py.File(target, "w") as file:
        answer_file.write(source.read, file)
    yield messages.pack({"is_end": True})


# Imported at their first use otherwise, when no file can be opened any more.
for _encoding in ("ascii", "utf-8", "latin-1"):
    codecs.lookup(_encoding)

if __name__ == "__main__":
    # A group of its own keeps a terminal's Ctrl-C away; whoever wants an end of it closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
