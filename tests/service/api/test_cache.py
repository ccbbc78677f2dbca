"""The answer cache over HTTP: the header, the same answers on every route and in every format, and its metrics."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from prometheus_client import REGISTRY

from service.inference import TASKS
from tests.builders import arrow_body, counts, gene_table, json_body
from tests.conftest import serving

GENES = gene_table().gene_symbol
JSON = {"Content-Type": "application/json"}
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
CELLS = counts(20)
HEADER = "x-cellserve-cache"


@pytest.fixture
async def client(tiny_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(tiny_path, cache_bytes=2**22) as client:
        yield client


def latent_of(answer: httpx.Response) -> NDArray[np.float32]:
    """The latent of an answer in either format."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        cells = answer.json()["cells"]
    else:
        cells = pa.ipc.open_stream(answer.content).read_all().to_pylist()
    return np.array([cell["latent"] for cell in cells], dtype=np.float32)


@pytest.mark.parametrize("task", TASKS)
async def test_only_the_header_tells(client: httpx.AsyncClient, tiny_path: Path, task: str) -> None:
    """An answer from the cache is byte for byte the answer of a server without one, in both formats."""
    async with serving(tiny_path) as plain:
        for body, kind in ((json_body(CELLS, GENES), JSON), (arrow_body(CELLS, GENES), ARROW)):
            headers = {**kind, "X-Request-ID": "same"}
            expected = await plain.post(f"/v1/{task}", content=body, headers=headers)
            assert HEADER not in expected.headers
            known = 0 if kind is JSON else 20
            for n_known in (known, 20):
                answer = await client.post(f"/v1/{task}", content=body, headers=headers)
                assert answer.content == expected.content
                assert answer.headers[HEADER] == f"hits={n_known}, misses={20 - n_known}"
                assert set(answer.headers) == {*expected.headers, HEADER}


async def test_across_formats_and_routes(client: httpx.AsyncClient) -> None:
    """Cells that came as JSON are known when they come as Arrow, in a stream or as tensors, in another order of genes."""
    first = await client.post("/v1/embed", content=json_body(CELLS[:8], GENES), headers=JSON)
    order = list(range(len(GENES)))[::-1]
    turned = arrow_body(CELLS[:, order], tuple(GENES[at] for at in order))
    second = await client.post("/v1/embed", content=turned, headers=ARROW)
    assert (first.headers[HEADER], second.headers[HEADER]) == ("hits=0, misses=8", "hits=8, misses=12")
    assert latent_of(second)[:8].tobytes() == latent_of(first).tobytes()
    before = REGISTRY.get_sample_value("cellserve_cache_cells_total", {"outcome": "hit"}) or 0
    streamed = await client.post("/v1/embed", content=turned, headers={**ARROW, "X-Cellserve-Stream": "1"})
    assert latent_of(streamed).tobytes() == latent_of(second).tobytes()
    assert REGISTRY.get_sample_value("cellserve_cache_cells_total", {"outcome": "hit"}) == before + 20
    assert HEADER not in streamed.headers  # it is sent before the number is known
    tensor = {
        "inputs": [
            {
                "name": "counts",
                "datatype": "FP32",
                "shape": list(CELLS.shape),
                "data": CELLS.toarray().ravel().tolist(),
            },
        ],
        "outputs": [{"name": "latent"}],
    }
    infer = await client.post("/v2/models/tiny/infer", content=json.dumps(tensor), headers=JSON)
    assert infer.headers[HEADER] == "hits=20, misses=0", infer.text
    latent = np.array(infer.json()["outputs"][0]["data"], dtype=np.float32)
    assert latent.tobytes() == latent_of(second).tobytes()


async def test_metrics(client: httpx.AsyncClient) -> None:
    """Hits and misses are there from the start; bytes are those of the cache."""
    text = (await client.get("/metrics")).text
    assert 'cellserve_cache_cells_total{outcome="hit"}' in text
    await client.post("/v1/embed", content=json_body(CELLS, GENES), headers=JSON)

    cache = client.state.cached.cache  # type: ignore[attr-defined]
    assert f"cellserve_cache_bytes {float(cache.n_bytes)}" in (await client.get("/metrics")).text
    assert len(cache) == 21  # cells, and how their answers lie
