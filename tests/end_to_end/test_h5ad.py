"""Files of AnnData over HTTP, with a real server and real cells: the same bits as by any other way, and nothing that a file can break."""

import contextlib
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import httpx
import numpy as np
import psutil
import pytest
import scipy.sparse as sp

from service.client import CellserveProblem, Client
from tests.builders import arrow_body
from tests.end_to_end.conftest import STORE, many
from tests.end_to_end.server import Server
from tests.end_to_end.test_bits import ARROW, latent_of

H5AD = {"Content-Type": "application/x-hdf5"}


@pytest.fixture(scope="module")
def latent(server: Server, cells: ad.AnnData) -> np.ndarray:
    """The latent of the cells as Arrow gives it."""
    body = arrow_body(sp.csr_matrix(cells.X), tuple(cells.var_names))
    return latent_of(httpx.post(server.url + "/v1/embed", content=body, headers=ARROW))


def with_counts(cells: ad.AnnData, place: str, matrix: object) -> ad.AnnData:
    """The cells with their counts in one place only."""
    normalised = cells.X.copy()
    normalised.data = np.log1p(normalised.data)
    adata = ad.AnnData(matrix, obs=cells.obs, var=cells.var)
    if place == "raw/X":
        adata.raw = adata
    if place == "layers/counts":
        adata.layers["counts"] = matrix
    if place != "X":
        adata.X = normalised
    return adata


@pytest.mark.parametrize("place", ["X", "raw/X", "layers/counts"])
@pytest.mark.parametrize(
    "form", [sp.csr_matrix, sp.csc_matrix, lambda matrix: matrix.toarray()], ids=["csr", "csc", "dense"]
)
def test_the_same_bits(
    server: Server,
    cells: ad.AnnData,
    latent: np.ndarray,
    tmp_path: Path,
    place: str,
    form: Callable[[sp.csr_matrix], object],
) -> None:
    """csr, csc and dense counts in X, raw/X and a layer give the bits that Arrow gives, in the same order, and say where they were."""
    with_counts(cells, place, form(cells.X)).write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    content = (tmp_path / "cells.h5ad").read_bytes()

    answer = httpx.post(server.url + "/v1/embed", content=content, headers={**H5AD, "Accept": "application/json"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["counts"]["source"] == place
    assert [cell["cell_id"] for cell in answer.json()["cells"]] == list(cells.obs_names)
    assert latent_of(answer).tobytes() == latent.tobytes()
    arrow = httpx.post(server.url + "/v1/embed", content=content, headers={**H5AD, "Accept": ARROW["Content-Type"]})
    assert latent_of(arrow).tobytes() == latent.tobytes()


def test_the_client(server: Server, cells: ad.AnnData, latent: np.ndarray, tmp_path: Path) -> None:
    """`Client.upload` sends a file from disk and gives what `Client.embed` and `Client.annotate` put into their copies."""
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with Client(server.url, model="pbmc") as client:
        embedded = client.upload(tmp_path / "cells.h5ad", "embed", gene_key="gene_id", output=tmp_path / "answer.h5ad")
        annotated = client.upload(tmp_path / "cells.h5ad", "annotate", layer="X")
        expected = client.annotate(cells)
        with pytest.raises(CellserveProblem, match="no 'layers/nope'"):
            client.upload(tmp_path / "cells.h5ad", "embed", layer="nope")

    assert embedded.obsm["X_pbmc"].tobytes() == latent.tobytes()
    assert ad.read_h5ad(tmp_path / "answer.h5ad").obsm["X_pbmc"].tobytes() == latent.tobytes()
    assert list(annotated.obs_names) == list(cells.obs_names)
    for column in annotated.obs:
        assert list(annotated.obs[column]) == list(expected.obs[column])
    assert np.array_equal(annotated.obsm["probabilities"], expected.obsm["probabilities"].to_numpy())
    assert list(annotated.uns["cellserve_names"]["probabilities"]) == list(expected.obsm["probabilities"].columns)
    assert json.loads(annotated.uns["cellserve"]["annotate"])["counts"]["source"] == "X"


@contextlib.contextmanager
def own_server(**environment: str) -> Iterator[Server]:
    """A server of the test's own."""
    running = Server(STORE, **environment)
    try:
        yield running.start().wait_until_ready()
    finally:
        running.close()


def readers(server: Server) -> list[psutil.Process]:
    """The processes of a server that read files."""
    assert server.process is not None
    return [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "service.cells.hdf5.process" in " ".join(child.cmdline())
    ]


def test_what_reads_is_killed(cells: ad.AnnData, tmp_path: Path) -> None:
    """No process reads files before the first; one that is killed in the middle is that client's problem, and the next upload works."""
    cells.write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    with own_server(CELLSERVE_UPLOAD_DIRECTORY=str(tmp_path)) as server:
        headers = {**H5AD, "Accept": "application/json"}
        assert readers(server) == []
        assert httpx.post(server.url + "/v1/embed", content=content, headers=headers).status_code == 200
        (reader,) = readers(server)
        os.kill(reader.pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (reader.pid, signal.SIGKILL)).start()

        refused = httpx.post(server.url + "/v1/embed", content=content, headers=headers, timeout=30)
        again = httpx.post(server.url + "/v1/embed", content=content, headers=headers, timeout=30)

        assert (refused.status_code, refused.json()["code"]) == (400, "file_reader_ended")
        assert again.status_code == 200
        assert httpx.get(server.url + "/livez").status_code == httpx.get(server.url + "/readyz").status_code == 200
        left = readers(server)
        assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]
        assert server.stop() == 0
    assert not any(process.is_running() for process in left)


def test_a_client_that_leaves_in_the_middle(cells: ad.AnnData, tmp_path: Path) -> None:
    """Of a body whose client leaves nothing stays: no file, and no byte that counts as held."""
    with own_server(CELLSERVE_UPLOAD_DIRECTORY=str(tmp_path)) as server:
        connection = httpx.Client()

        def endless() -> Iterator[bytes]:
            yield bytes(2**20)
            raise ConnectionAbortedError

        with pytest.raises(ConnectionAbortedError):
            connection.post(server.url + "/v1/embed", content=endless(), headers=H5AD)
        connection.close()
        deadline = time.monotonic() + 10
        while "cellserve_upload_bytes_in_flight 0.0" not in httpx.get(server.url + "/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)

        assert list(tmp_path.iterdir()) == []


def heap_bytes(process: psutil.Process) -> int:
    """Memory that is no part of a file: what the system can write back or drop is not counted."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


def test_memory_does_not_grow_with_the_file(cells: ad.AnnData, tmp_path: Path) -> None:
    """While a large file is answered the server grows by a fraction of it, and so does what reads it."""
    thousands = sp.vstack([many(cells, 10_000)] * 6, format="csc")
    ad.AnnData(thousands, var=cells.var).write_h5ad(tmp_path / "cells.h5ad")
    n_bytes = (tmp_path / "cells.h5ad").stat().st_size
    peaks: dict[int, int] = {}
    is_done = threading.Event()
    with own_server() as server:
        assert server.process is not None
        parent = psutil.Process(server.process.pid)
        before = {child.pid: heap_bytes(child) for child in parent.children(recursive=True)}

        def watch() -> None:
            while not is_done.wait(0.05):
                for child in parent.children(recursive=True):
                    with contextlib.suppress(OSError, TypeError):
                        peaks[child.pid] = max(peaks.get(child.pid, 0), heap_bytes(child) - before.get(child.pid, 0))

        watcher = threading.Thread(target=watch)
        watcher.start()
        with Client(server.url, model="pbmc", timeout=300) as client:
            answer = client.upload(tmp_path / "cells.h5ad", "embed")
        is_done.set()
        watcher.join()

    assert answer.n_obs == 60_000
    assert n_bytes > 180e6
    assert max(growth for pid, growth in peaks.items() if pid in before) < 90e6, peaks  # the service itself
    assert max(growth for pid, growth in peaks.items() if pid not in before) < 350e6, peaks  # what sorts the columns


def test_small_body(server: Server) -> None:
    """What is no HDF5 is malformed, whatever it says it is."""
    for content in (b"x", io.BytesIO(bytes(2**20)).read()):
        answer = httpx.post(server.url + "/v1/embed", content=content, headers=H5AD)
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed_body")
