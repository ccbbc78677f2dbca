"""Files that somebody may send: none gets out of its file, past its limits, or takes anything but its own process along."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import psutil
import pytest
from h5py import h5d, h5p, h5s, h5t

from service.cells.file_processes import FileProcesses, Limits
from service.errors import (
    CellserveError,
    FileNeedsTooMuch,
    FileReaderEnded,
    FileRefused,
    FileTooLarge,
    InvalidCells,
    MalformedBody,
    NoCells,
    TooManyCells,
)
from tests.service.cells.hdf5.reading import LIMITS, changed, read, replace

Change = Callable[[h5py.File], object]


def external_link(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["X"] = np.ones((7, 40))
    del file["X"]
    file["X"] = h5py.ExternalLink("other.h5", "/X")


def soft_link(file: h5py.File) -> None:
    file.move("X", "elsewhere")
    file["X"] = h5py.SoftLink("/elsewhere")


def link_to_itself(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.SoftLink("/X")


def external_storage(file: h5py.File) -> None:
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes(bytes(7 * 40 * 4))
    del file["X"]
    file.create_dataset("X", (7, 40), "f4", external=[(str(secret), 0, 7 * 40 * 4)])


def virtual_data(file: h5py.File) -> None:
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["X"] = np.ones((7, 40))
    del file["X"]
    layout = h5py.VirtualLayout((7, 40), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "X", (7, 40))
    file.create_virtual_dataset("X", layout)


def unknown_filter(file: h5py.File) -> None:
    del file["X"]
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_chunk((7, 40))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)  # zstd; optional, so that it can be written without it
    h5d.create(file.id, b"X", h5t.IEEE_F32LE, h5s.create_simple((7, 40)), plist)


def lists_of_numbers(file: h5py.File) -> None:
    del file["X/data"]
    file.create_dataset("X/data", (10,), h5py.vlen_dtype(np.dtype("i4")))


def references(file: h5py.File) -> None:
    del file["X/data"]
    file.create_dataset("X/data", (10,), h5py.ref_dtype)


def text_for_numbers(file: h5py.File) -> None:
    replace(file["X"], "data", np.array(["a"] * 10, dtype=h5py.string_dtype()))


def complex_numbers(file: h5py.File) -> None:
    replace(file["X"], "data", np.ones(10, np.complex64))


def long_doubles(file: h5py.File) -> None:
    replace(file["X"], "data", np.ones(10, np.longdouble))


def enumeration(file: h5py.File) -> None:
    replace(file["X"], "data", np.ones(10, "i1"), dtype=h5py.enum_dtype({"one": 1}, "i1"))


def opaque_names(file: h5py.File) -> None:
    replace(file["obs"], "_index", np.zeros(7, "V8"))


def names_of_references(file: h5py.File) -> None:
    del file["var/_index"]
    file["var"].create_dataset("_index", (40,), h5py.ref_dtype)


def a_type_for_a_matrix(file: h5py.File) -> None:
    del file["X"]
    file["X"] = np.dtype("f4")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (external_link, "'X' in the file is an external link"),
        (soft_link, "'X' in the file is a soft link"),
        (link_to_itself, "'X' in the file is a soft link"),
        (external_storage, "'X' in the file is a data set in another file"),
        (virtual_data, "'X' in the file is a virtual data set"),
        (unknown_filter, r"'X' in the file is compressed with '.*' \(filter 32015\).*compression='gzip' or 'lzf'"),
        (lists_of_numbers, "'X/data' in the file is of type lists of variable length"),
        (references, "'X/data' in the file is of type reference"),
        (text_for_numbers, "'X/data' in the file is of type string"),
        (complex_numbers, "'X/data' in the file is of type"),
        (long_doubles, "'X/data' in the file is of type"),
        (enumeration, "'X/data' in the file is of type enumeration"),
        (opaque_names, "'obs/_index' in the file is of type opaque.*strings"),
        (names_of_references, "'var/_index' in the file is of type reference.*strings"),
        (a_type_for_a_matrix, "'X' in the file is a named type"),
    ],
)
def test_refused(processes: FileProcesses, path: Path, change: Change, found: str) -> None:
    """What leads out of the file, or is no number or name, is refused with its place, and never followed."""
    with changed(path) as file:
        change(file)

    with pytest.raises(FileRefused, match=found):
        read(processes, path)


def huge_dense(file: h5py.File) -> None:
    del file["X"]
    file.create_dataset("X", (7, 10**9), "f4", chunks=(1, 1000))


def huge_sparse(file: h5py.File) -> None:
    for name in ("data", "indices"):
        del file["X"][name]
        file["X"].create_dataset(name, (10**12,), "i4", chunks=(1000,))


def huge_chunk(file: h5py.File) -> None:
    del file["X"]
    file.create_dataset("X", (7, 40), "f4", chunks=(2**13, 2**13), maxshape=(None, None))


def huge_rows(file: h5py.File) -> None:
    del file["X/indptr"]
    file.create_dataset("X/indptr", (2**26,), "i8", chunks=(1000,))


def huge_names(file: h5py.File) -> None:
    replace(file["var"], "_index", np.zeros(40, "S2000000"), compression="gzip")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (huge_dense, "X"),
        (huge_sparse, "X/indices"),
        (huge_chunk, "X"),
        (huge_rows, "X/indptr"),
        (huge_names, "var/_index"),
    ],
)
def test_bombs(processes: FileProcesses, path: Path, change: Change, place: str) -> None:
    """Shapes and chunks that declare too much are refused by what they declare, at once: nothing is allocated or decompressed."""
    with changed(path) as file:
        change(file)
    assert path.stat().st_size < 2**23

    started = time.monotonic()
    with pytest.raises(FileTooLarge) as refused:
        read(processes, path)

    assert refused.value.path == place
    assert refused.value.n_bytes > refused.value.limit_bytes
    assert time.monotonic() - started < 5


def test_a_chunk_that_inflates_beyond_what_it_declares(processes: FileProcesses, path: Path) -> None:
    """A deflate stream that goes on and on runs into the bound on memory, and takes only that process along."""
    with changed(path) as file:
        del file["X"]
        dataset = file.create_dataset("X", (7, 40), "f4", chunks=(7, 40), compression="gzip")
        packer = zlib.compressobj(1)
        bomb = b"".join(packer.compress(bytes(2**24)) for _ in range(48)) + packer.flush()
        dataset.id.write_direct_chunk((0, 0), bomb)
    limits = Limits(seconds=20, memory_bytes=2**29, file_bytes=2**20)

    with pytest.raises((FileNeedsTooMuch, FileReaderEnded, MalformedBody)):
        read(processes, path, limits)

    ad.AnnData(np.ones((2, 3), "f4")).write_h5ad(path)
    assert read(processes, path)[1].shape == (2, 3)


def not_whole_numbers(file: h5py.File) -> None:
    replace(file["X"], "indices", file["X/indices"][()].astype("f4"))


def rows_beyond(file: h5py.File) -> None:
    indptr = file["X/indptr"][()]
    indptr[-1] += 5
    replace(file["X"], "indptr", indptr)


def a_long_name(file: h5py.File) -> None:
    replace(file["obs"], "_index", np.array(["x" * 257] * 7, dtype=h5py.string_dtype()))


def falling_rows(file: h5py.File) -> None:
    indptr = file["X/indptr"][()]
    indptr[2], indptr[3] = indptr[3], indptr[2]
    replace(file["X"], "indptr", indptr)


def negative_rows(file: h5py.File) -> None:
    indptr = file["X/indptr"][()].astype("i8")
    indptr[1] = -(2**60)
    replace(file["X"], "indptr", indptr)


def fewer_indices(file: h5py.File) -> None:
    replace(file["X"], "indices", file["X/indices"][:-1])


def another_shape(file: h5py.File) -> None:
    file["X"].attrs["shape"] = (7, 41)


def no_shape(file: h5py.File) -> None:
    del file["X"].attrs["shape"]


def negative_shape(file: h5py.File) -> None:
    file["X"].attrs["shape"] = (-7, 40)


def no_data(file: h5py.File) -> None:
    del file["X/data"]


def a_cube(file: h5py.File) -> None:
    del file["X"]
    file["X"] = np.ones((7, 40, 2))


def nothing(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.Empty("f4")


def no_obs(file: h5py.File) -> None:
    del file["obs"]


def no_index(file: h5py.File) -> None:
    del file["obs"].attrs["_index"]
    file.move("obs/_index", "obs/other")


def not_utf8(file: h5py.File) -> None:
    replace(file["var"], "_index", np.array([b"\xff\xfe"] * 40, "S2"))


def one_long_row(file: h5py.File) -> None:
    del file["X/indptr"], file["X/indices"], file["X/data"]
    file["X/indptr"] = np.array([0, 50, 50, 50, 50, 50, 50, 50])
    file["X/indices"], file["X/data"] = np.zeros(50, "i4"), np.ones(50, "f4")


def loom(file: h5py.File) -> None:
    for name in list(file):
        del file[name]
    file["matrix"] = np.ones((40, 7))
    for name in ("row_attrs", "col_attrs"):
        file.create_group(name)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (rows_beyond, "'X/indptr' must rise from 0"),
        (falling_rows, "'X/indptr' must rise from 0"),
        (negative_rows, "'X/indptr' must rise from 0"),
        (fewer_indices, "'X/indptr' must rise from 0"),
        (another_shape, "'X' has the shape 7 by 41"),
        (no_shape, "without the attributes"),
        (negative_shape, "'X' has the shape -7 by 40"),
        (no_data, "no data set 'X/data'"),
        (a_cube, "must have 2 axes"),
        (nothing, "must have 2 axes"),
        (no_obs, "no 'obs' and 'var'"),
        (no_index, "'obs' does not say"),
        (not_utf8, "'var/_index' is not UTF-8"),
        (a_long_name, "Entry 0 of 'obs/_index' has more than 256 characters"),
        (one_long_row, "'X' has a line of 50 values"),
        (loom, "it is a loom file"),
    ],
)
def test_what_is_not_whole(processes: FileProcesses, path: Path, change: Change, found: str) -> None:
    """What does not fit together is named."""
    with changed(path) as file:
        change(file)

    with pytest.raises(InvalidCells, match=found):
        read(processes, path)


def test_indices_of_another_type(processes: FileProcesses, path: Path) -> None:
    """Columns must be whole numbers."""
    with changed(path) as file:
        not_whole_numbers(file)

    with pytest.raises(FileRefused, match="'X/indices' in the file is of type float32"):
        read(processes, path)


def test_a_row_beyond_a_csc_matrix(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """Rows of a csc matrix are looked at before they are used."""
    adata.X = adata.X.tocsc()
    for wrong in (7, -1, 2**31 - 1):
        adata.write_h5ad(path)
        with changed(path) as file:
            file["X/indices"][3] = wrong
        with pytest.raises(InvalidCells, match="'X/indices' names a row beyond the 7 rows"):
            read(processes, path)


@pytest.mark.parametrize("length", [0.999, 0.5, 0.1, 0.01])
def test_cut_off(processes: FileProcesses, path: Path, length: float) -> None:
    """A file that is cut off anywhere is malformed."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * length)])

    with pytest.raises(MalformedBody, match=r"no HDF5 file, cut off or damaged"):
        read(processes, path)


@pytest.mark.parametrize(
    "content", [b"x", b"PK\x03\x04" * 100, b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(5000)]
)
def test_not_hdf5(processes: FileProcesses, path: Path, content: bytes) -> None:
    """Other files are malformed."""
    path.write_bytes(content)

    with pytest.raises(MalformedBody, match="no HDF5 file"):
        read(processes, path)


def test_any_byte_may_be_wrong(processes: FileProcesses, path: Path) -> None:
    """Whatever is overwritten in a file, it is read or refused, and the next file is read."""
    content, random = path.read_bytes(), np.random.default_rng(0)
    limits = Limits(seconds=5, memory_bytes=2**29, file_bytes=2**20)
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 20):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        # The latter are scipy's, in this test; the server looks at what comes before it uses it.
        with contextlib.suppress(CellserveError, ValueError, IndexError):
            read(processes, path, limits)
    path.write_bytes(content)
    assert read(processes, path)[1].shape == (7, 40)


def test_numbers_of_cells(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """No cell, and more than are allowed, are said before a matrix is looked at."""
    with pytest.raises(TooManyCells) as refused:
        read(processes, path, max_cells=6)
    assert (refused.value.n_cells, refused.value.limit_cells) == (7, 6)
    adata[:0].copy().write_h5ad(path)
    with pytest.raises(NoCells):
        read(processes, path)


def test_too_long(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """A file that takes longer than it may is given up, and the next one is read."""
    big = ad.AnnData(np.ones((900, 15_000), "f4"))
    big.write_h5ad(path, compression="gzip", compression_opts=9)
    limits = Limits(seconds=0.05, memory_bytes=2**30, file_bytes=2**20)

    with pytest.raises(FileNeedsTooMuch, match="0 seconds"):
        read(processes, path, limits)

    adata.write_h5ad(path)
    assert read(processes, path)[1].shape == (7, 40)


def test_bounds_of_the_system(processes: FileProcesses, path: Path) -> None:
    """The system itself bounds a process's memory, its time on the processor and what it writes; the time anew for each file."""
    for _ in range(2):
        read(processes, path)
    with processes.lease() as process:
        system = psutil.Process(process.pid)
        spent = sum(system.cpu_times()[:2])

        assert system.rlimit(psutil.RLIMIT_AS)[0] == LIMITS.memory_bytes
        assert system.rlimit(psutil.RLIMIT_FSIZE)[0] == LIMITS.file_bytes
        assert system.rlimit(psutil.RLIMIT_CORE)[0] == 0
        assert (
            Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "1000"
        )  # it goes first, where memory runs out
        assert LIMITS.seconds - 1 < system.rlimit(psutil.RLIMIT_CPU)[0] - spent < LIMITS.seconds + 2


@pytest.mark.parametrize(
    ("number", "error", "found"),
    [
        (signal.SIGKILL, FileReaderEnded, "SIGKILL"),
        (signal.SIGSEGV, FileReaderEnded, "SIGSEGV"),
        (signal.SIGXCPU, FileNeedsTooMuch, "20 seconds"),
    ],
)
def test_killed(
    processes: FileProcesses, path: Path, number: signal.Signals, error: type[CellserveError], found: str
) -> None:
    """Whatever ends the process is said, with its signal; the next file has another process."""
    with processes.lease() as process:
        first = process.pid
    os.kill(first, signal.SIGSTOP)

    def end() -> None:
        os.kill(first, number)
        os.kill(first, signal.SIGCONT)

    killer = threading.Timer(0.3, end)
    killer.start()

    with pytest.raises(error, match=found):
        read(processes, path)

    killer.join()
    assert read(processes, path)[1].shape == (7, 40)
    with processes.lease() as process:
        assert process.pid != first


def test_the_end_of_all(path: Path) -> None:
    """When the server ends, so does a process in the middle of its work, and who waits for it is told."""
    pool = FileProcesses()
    with pool.lease() as process:
        number = process.pid
    os.kill(number, signal.SIGSTOP)
    threading.Timer(0.3, pool.close).start()

    with pytest.raises(FileReaderEnded, match="SIGKILL"):
        read(pool, path)
    assert not psutil.pid_exists(number)


def test_a_process_is_kept(processes: FileProcesses, path: Path) -> None:
    """One process reads one file after the other, the wrong ones too."""
    with processes.lease() as process:
        first = process.pid
    read(processes, path)
    with changed(path) as file:
        del file["X"]
    with pytest.raises(CellserveError):
        read(processes, path)
    with processes.lease() as process:
        assert process.pid == first


def test_nothing_else_can_be_opened(path: Path) -> None:
    """While a file is read, the process could not open another one even if something made it try."""
    from service.cells.hdf5.process import _nothing_else_opened

    with _nothing_else_opened(), pytest.raises(OSError, match="Too many open files"):
        path.open()
    path.open().close()


def test_the_server_itself_does_without() -> None:
    """A start of the server imports no h5py, which costs it nothing then and cannot crash it later."""
    script = "import sys, service.app, service.worker; print('h5py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.split()[-1] == "False"


def test_no_secret_is_handed_on(processes: FileProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process knows no setting of the server."""
    monkeypatch.setenv("CELLSERVE_ADMIN_TOKEN", "a secret of the server")
    pool = FileProcesses()
    with pool.lease() as process:
        time.sleep(0.1)
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    pool.close()

    assert b"secret" not in environment
    assert b"HDF5_PLUGIN_PRELOAD=::" in environment
