"""A server's life: loading, refusing what is broken, draining, and settings that are wrong."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import builders
from tests.builders import arrow_body, counts, gene_table
from tests.end_to_end.server import PYTHON, Server, until

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
GENES = gene_table().gene_symbol


@pytest.fixture
def start(request: pytest.FixtureRequest):
    """Start a server of a store with settings; ended with the test."""

    def start(store: Path, **environment: str) -> Server:
        server = Server(store, **environment)
        request.addfinalizer(server.close)
        return server.start()

    return start


def test_broken_version(start, tiny_store: Path) -> None:
    """A version with one changed byte is not served; the others are, and readiness, log and a metric say why."""
    graph = tiny_store / "tiny/2/decode.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    server = start(tiny_store).wait_until_ready()

    assert "decode.onnx" in httpx.get(server.url + "/readyz").json()["models"]["tiny@2"]
    assert "decode.onnx" in server.log()
    assert server.metric(r'cellserve_model_failed\{model="tiny",version="2"\}') == 1
    body = arrow_body(counts(2), GENES)
    assert httpx.post(server.url + "/v1/embed?model=tiny", content=body, headers=ARROW).status_code == 200
    refused = httpx.post(server.url + "/v1/embed?model=tiny@2", content=body, headers=ARROW)
    assert (refused.status_code, refused.json()["code"]) == (503, "model_not_ready")


def test_broken_default_version(start, tiny_store: Path) -> None:
    """Without its default version a model does not answer, and the server is alive but not ready."""
    (tiny_store / "tiny/1/golden.npz").unlink()
    server = start(tiny_store)
    server.wait_until("/livez")
    with pytest.raises(AssertionError, match="did not answer"):
        server.wait_until("/readyz", seconds=2)

    answer = httpx.get(server.url + "/readyz")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert "golden.npz" in answer.json()["detail"]


def test_empty_store(start, tmp_path: Path) -> None:
    """A store without models is said to be one, with what to do."""
    server = start(tmp_path)
    server.wait_until("/livez")

    answer = httpx.get(server.url + "/readyz")
    assert answer.status_code == 503
    assert "There is no model" in answer.json()["detail"]


def test_files_that_go_away(start, tiny_store: Path) -> None:
    """What is loaded is served even when its files are removed."""
    server = start(tiny_store).wait_until_ready()
    shutil.rmtree(tiny_store / "tiny")

    answer = httpx.post(server.url + "/v1/embed", content=arrow_body(counts(2), GENES), headers=ARROW)
    assert answer.status_code == 200


async def test_drain(start, tiny_store: Path) -> None:
    """SIGTERM under load: every request that was accepted is answered, and the exit code is 0."""
    server = start(tiny_store).wait_until_ready()
    body = arrow_body(counts(20_000), GENES)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        requests = [asyncio.create_task(client.post("/v1/reconstruct", content=body, headers=ARROW)) for _ in range(4)]
        await until(lambda: server.metric("cellserve_requests_in_flight") >= 5)  # the four, and this one
        server.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*requests)

    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(answer.content.endswith(b"\xff\xff\xff\xff\x00\x00\x00\x00") for answer in answers)
    assert await asyncio.to_thread(server.stop) == 0


async def test_disconnect(start, tiny_store: Path) -> None:
    """A client that leaves takes its cells out of the queue."""
    server = start(tiny_store, CELLSERVE_BATCH_ROWS="1").wait_until_ready()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asked = asyncio.create_task(client.post("/v1/embed", content=arrow_body(counts(50_000), GENES), headers=ARROW))
        await until(lambda: server.metric("cellserve_queue_rows") > 0)
        asked.cancel()
        # Far sooner than its cells would have run.
        await until(lambda: server.metric("cellserve_cancelled_total") == 1, seconds=5)

    assert server.metric("cellserve_queue_rows") == 0


async def test_disconnect_within_the_body(start, tiny_store: Path) -> None:
    """A client that leaves before all of its body is there is counted, and gives its room back."""
    server = start(tiny_store).wait_until_ready()
    before = server.metric("cellserve_body_bytes_in_flight")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            b"Content-Type: application/vnd.apache.arrow.stream\r\n\r\n0123"
        )
        await until(lambda: server.metric("cellserve_body_bytes_in_flight") == before + 1000)
    await until(lambda: server.metric("cellserve_cancelled_total") == 1)

    assert server.metric("cellserve_body_bytes_in_flight") == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CELLSERVE_BATCH_ROWS", "-1"),
        ("CELLSERVE_TIMEOUT_SECONDS", "soon"),
        ("CELLSERVE_PROVIDER", "tpu"),
        ("CELLSERVE_BATCHROWS", "5"),
    ],
)
def test_wrong_setting(start, tiny_store: Path, name: str, value: str) -> None:
    """A setting that is unknown or not allowed stops the start and is named."""
    server = start(tiny_store, **{name: value})
    with pytest.raises(AssertionError):
        server.wait_until("/livez", seconds=15)

    assert name in server.log()
    assert server.process.wait(20) != 0


def test_provider_that_is_not_there(start, tiny_store: Path) -> None:
    """Asking for CUDA without a GPU is an error, and with permission to fall back it is reported."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        pytest.skip("this machine has a GPU")
    refused = start(tiny_store, CELLSERVE_PROVIDER="cuda")
    with pytest.raises(AssertionError):
        refused.wait_until("/livez", seconds=15)
    assert "CELLSERVE_ALLOW_PROVIDER_FALLBACK" in refused.log()

    server = start(tiny_store, CELLSERVE_PROVIDER="cuda", CELLSERVE_ALLOW_PROVIDER_FALLBACK="true").wait_until_ready()
    assert httpx.get(server.url + "/v1/models").json()["models"][0]["provider"] == "cpu"


def test_no_torch_where_it_serves() -> None:
    """The interpreter that serves in `make test` has no torch."""
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.skip(f"{PYTHON} is not set: the server runs in this very environment")
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in done.stderr
    assert subprocess.run([python, "-c", "import service.app"], capture_output=True).returncode == 0
    assert sys.executable != python


def test_builders_are_seeded() -> None:
    """The tiny artifact is the same in every run."""
    assert builders.parts()[1]["encode.onnx"] == builders.parts()[1]["encode.onnx"]
