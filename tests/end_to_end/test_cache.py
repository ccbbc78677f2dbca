"""A real server with an answer cache: the same bits in every state of it, on every route and in every format."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import httpx
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from service.client import CellserveProblem, Client
from service.contract.store import Store
from tests.builders import arrow_body, counts, gene_table, json_body, write_artifact
from tests.end_to_end.conftest import STORE, many
from tests.end_to_end.server import Server

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
JSON = {"Content-Type": "application/json"}
STREAM = {**ARROW, "X-Cellserve-Stream": "1"}
CACHE_BYTES = 2**20
"""Room for about three thousand embeddings."""


@pytest.fixture(scope="module")
def cached() -> Iterator[Server]:
    """A ready server of the shipped model with a small cache."""
    running = Server(STORE, CELLSERVE_CACHE_BYTES=str(CACHE_BYTES))
    try:
        yield running.start().wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="module")
def query(cells: ad.AnnData) -> sp.csr_matrix:
    """Some hundred different cells."""
    return many(cells, 300)


@pytest.fixture(scope="module")
def genes(cells: ad.AnnData) -> tuple[str, ...]:
    return tuple(cells.var_names)


@pytest.fixture(scope="module")
def expected(server: Server, query: sp.csr_matrix, genes: tuple[str, ...]) -> NDArray[np.float32]:
    """What a server without a cache answers."""
    answer = httpx.post(server.url + "/v1/embed", content=arrow_body(query, genes), headers=ARROW, timeout=60)
    assert "x-cellserve-cache" not in answer.headers
    return latent_of(answer)


def latent_of(answer: httpx.Response) -> NDArray[np.float32]:
    """The latent of an answer in any format."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        document = answer.json()
        if "outputs" in document:
            (output,) = document["outputs"]
            return np.array(output["data"], dtype=np.float32).reshape(output["shape"])
        return np.array([cell["latent"] for cell in document["cells"]], dtype=np.float32)
    column = pa.ipc.open_stream(answer.content).read_all().column("latent").combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def infer_body(counts: sp.csr_matrix) -> bytes:
    """The same cells as tensors of the Open Inference Protocol."""
    data = counts.toarray().ravel().tolist()
    inputs = [{"name": "counts", "datatype": "FP32", "shape": list(counts.shape), "data": data}]
    return json.dumps({"inputs": inputs, "outputs": [{"name": "latent"}]}).encode()


async def test_every_way_in_every_state(
    cached: Server, cells: ad.AnnData, query: sp.csr_matrix, genes: tuple[str, ...], expected: NDArray[np.float32]
) -> None:
    """Cells picked at random, some twice, through every route and format, by clients at once, while others crowd them out."""
    strangers = many(cells, 6_000)[300:]  # more than there is room for

    async def client(number: int) -> None:
        random = np.random.default_rng(number)
        async with httpx.AsyncClient(base_url=cached.url, timeout=60) as http:
            for turn in range(8):
                rows = random.integers(0, 300, random.integers(1, 100))
                some = query[rows]
                path, headers, body = [
                    ("/v1/embed", ARROW, arrow_body(some, genes)),
                    ("/v1/embed", JSON, json_body(some, genes)),
                    ("/v1/embed", STREAM, arrow_body(some, genes, rows_per_batch=7)),
                    ("/v2/models/pbmc/infer", JSON, infer_body(some)),
                ][(number + turn) % 4]
                answer = await http.post(path, headers=headers, content=body)
                assert latent_of(answer).tobytes() == expected[rows].tobytes(), (path, headers)
                if turn % 3 == 2:
                    crowd = strangers[random.integers(0, strangers.shape[0], 1_500)]
                    await http.post("/v1/embed", headers=ARROW, content=arrow_body(crowd, genes))

    await asyncio.gather(*(client(number) for number in range(8)))
    numbers = metrics(cached)
    assert numbers['cellserve_cache_cells_total{outcome="hit"}'] > 100
    assert numbers["cellserve_cache_evictions_total"] > 1_000
    assert 0 < numbers["cellserve_cache_bytes"] <= CACHE_BYTES


def test_cold_then_warm(cached: Server, query: sp.csr_matrix, genes: tuple[str, ...]) -> None:
    """Annotate and reconstruct, too: the second answer is the first, byte for byte, and says where it came from."""
    for path in ("/v1/annotate", "/v1/reconstruct?genes=CD3D,MS4A1&library_size=1000"):
        headers = {**ARROW, "X-Request-ID": "same"}
        answers = [
            httpx.post(cached.url + path, content=arrow_body(query[:200], genes), headers=headers) for _ in range(2)
        ]
        assert answers[0].content == answers[1].content
        assert answers[1].headers["x-cellserve-cache"] == "hits=200, misses=0"


def test_another_version_has_answers_of_its_own(tmp_path: Path) -> None:
    """When a name comes to mean another version, nothing of the old one is answered; a version that leaves takes its answers along."""
    store = tmp_path / "store"
    write_artifact(store, version="1")
    running = Server(store, CELLSERVE_CACHE_BYTES="1048576", CELLSERVE_ADMIN_TOKEN="a token for the test")
    body = arrow_body(counts(50), gene_table().gene_symbol)

    def reload() -> None:
        answer = httpx.post(
            running.url + "/v1/admin/reload", headers={"Authorization": "Bearer a token for the test"}, timeout=60
        )
        assert answer.status_code == 200, answer.text

    try:
        running.start().wait_until_ready()
        one = [httpx.post(running.url + "/v1/embed", content=body, headers=ARROW) for _ in range(2)]
        held = metrics(running)["cellserve_cache_bytes"]
        write_artifact(store, version="2", seed=5)
        Store(store).set_alias(Store(store).resolve("tiny@2"))
        reload()
        two = [httpx.post(running.url + "/v1/embed", content=body, headers=ARROW) for _ in range(2)]
        both = metrics(running)["cellserve_cache_bytes"]
        shutil.rmtree(store / "tiny/1")
        reload()
        left = metrics(running)["cellserve_cache_bytes"]
    finally:
        running.close()

    hits = [answer.headers["x-cellserve-cache"] for answer in (*one, *two)]
    assert hits == ["hits=0, misses=50", "hits=50, misses=0"] * 2
    assert [answer.headers["x-cellserve-model"] for answer in (*one, *two)] == ["tiny@1"] * 2 + ["tiny@2"] * 2
    assert latent_of(one[0]).tobytes() == latent_of(one[1]).tobytes() != latent_of(two[1]).tobytes()
    assert both > 1.5 * held
    assert left < 1.2 * held


def test_budgets_and_progress(cells: ad.AnnData) -> None:
    """A client that streams is slowed to its rate while another is served; how far it is can be asked, and its client is told."""
    running = Server(
        STORE,
        CELLSERVE_CLIENT_BUDGET_PER_SECOND="0.05",
        CELLSERVE_CLIENT_BUDGET_BURST="0.001",
    )
    genes = list(cells.var_names)
    told: list[tuple[int, int | None]] = []
    try:
        running.start().wait_until_ready()
        with Client(running.url, cells_per_request=200) as client:
            pieces = (many(cells, 200) for _ in range(4))
            batches = client.stream(
                "embed", pieces, genes, request_id="a/stream", on_progress=lambda *numbers: told.append(numbers)
            )
            next(batches)
            found = client.progress("a/stream")
            assert (found["state"], found["n_cells"]) == ("running", None)
            assert 0 < found["n_answered"] <= found["n_received"] <= 800
            other = httpx.post(
                running.url + "/v1/embed",
                content=arrow_body(many(cells, 3), tuple(genes)),
                headers={**ARROW, "X-Client-Key": "another"},
            )
            assert other.status_code == 200
            assert 200 + sum(map(len, batches)) >= 800
            assert told[-1] == (800, None)
            assert client.progress("a/stream")["n_cells"] == 800
            with pytest.raises(CellserveProblem) as unknown:
                client.progress("nothing")
            assert unknown.value.code == "request_not_found"
        assert metrics(running)['cellserve_client_budget_total{outcome="slowed"}'] >= 1
    finally:
        running.close()


def metrics(server: Server) -> dict[str, float]:
    """Values by series."""
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
