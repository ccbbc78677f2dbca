"""Liveness, readiness and metrics: they answer from the first moment on, and tell the truth."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import scipy.sparse as sp
from prometheus_client.parser import text_string_to_metric_families

from service.cells.columns import Columns, Values
from service.contract.store import Store
from service.inference import TASKS
from service.inference.batcher import run_whole
from service.inference.model import Model
from service.inference.task import Options
from service.inference.work import Work
from tests.builders import counts, gene_table, json_body, write_artifact
from tests.conftest import serving

JSON = {"Content-Type": "application/json"}
BODY = json_body(counts(3), gene_table().gene_symbol)


async def ready(client: httpx.AsyncClient) -> tuple[int, str]:
    """Status and reason of /readyz, which has one form for each."""
    answer = await client.get("/readyz")
    document = answer.json()
    if answer.status_code == 200:
        assert document["status"] == "ready"
        return 200, ""
    assert answer.headers["content-type"] == "application/problem+json"
    assert document["code"] == "not_ready"
    return answer.status_code, document["detail"]


async def test_before_during_and_after_loading(tiny_path: Path) -> None:
    """Livez answers all the time; readyz says that models are being loaded until they are."""
    async with serving(tiny_path, is_loaded=False) as client:
        assert (await client.get("/livez")).json() == {"status": "alive"}
        status, reason = await ready(client)
        assert (status, "being loaded" in reason) == (503, True)
        await asyncio.to_thread(client.state.models.start().join)
        assert await ready(client) == (200, "")
        assert (await client.get("/readyz")).json()["models"] == {"tiny@1": "ready"}


async def test_a_broken_version_beside_good_ones(tmp_path: Path) -> None:
    """Ready while every default version answers; the broken one is listed with its reason, and makes it unready as the default."""
    for version in ("1", "2"):
        write_artifact(tmp_path, version=version)
    (tmp_path / "tiny/2/encode.onnx").write_bytes(b"broken")
    store = Store(tmp_path)
    store.set_alias(store.resolve("tiny@1"))
    async with serving(tmp_path) as client:
        assert await ready(client) == (200, "")
        models = (await client.get("/readyz")).json()["models"]
        assert models["tiny@1"] == "ready"
        assert "encode.onnx" in models["tiny@2"]

    store.set_alias(store.resolve("tiny@2"))
    async with serving(tmp_path) as client:
        status, reason = await ready(client)
        assert status == 503
        assert "encode.onnx" in reason
        assert (await client.get("/readyz")).json()["models"]["tiny@1"] == "ready"
        assert (await client.post("/v1/embed?model=tiny@1", content=BODY, headers=JSON)).status_code == 200


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_store_without_models(tmp_path: Path, is_there: bool) -> None:
    """A store that is empty or not there is said to be, with its path and what to do."""
    root = tmp_path if is_there else tmp_path / "nowhere"
    async with serving(root) as client:
        status, reason = await ready(client)
        assert status == 503
        assert str(root) in reason
        assert "CELLSERVE_STORE" in reason
        assert (await client.get("/v1/models")).json()["models"] == []


async def test_a_store_that_cannot_be_read(tmp_path: Path) -> None:
    """While an aliases.json is broken its model cannot answer: 503 with the reason, never "there is no such model"."""
    write_artifact(tmp_path)
    (tmp_path / "tiny/aliases.json").write_text('{"default": "7"}')
    async with serving(tmp_path) as client:
        status, reason = await ready(client)
        assert status == 503
        assert "aliases.json" in reason
        refused = await client.post("/v1/embed?model=tiny", content=BODY, headers=JSON)
        assert (refused.status_code, refused.json()["code"]) == (503, "model_not_ready")
        assert "aliases.json" in refused.json()["detail"]


async def test_broken_aliases_of_one_model(tmp_path: Path) -> None:
    """A broken aliases.json of one model does not keep another model from being served."""
    write_artifact(tmp_path, name="one")
    write_artifact(tmp_path, name="two")
    (tmp_path / "one/aliases.json").write_text("nonsense")
    async with serving(tmp_path) as client:
        assert (await ready(client))[0] == 503
        assert (await client.post("/v1/embed?model=two", content=BODY, headers=JSON)).status_code == 200


async def test_while_draining(client: httpx.AsyncClient) -> None:
    """A server that shuts down is alive and not ready."""
    client.state.is_draining = True

    assert (await client.get("/livez")).status_code == 200
    status, reason = await ready(client)
    assert (status, "shutting down" in reason) == (503, True)


async def test_a_batcher_that_died(client: httpx.AsyncClient) -> None:
    """A server whose queue nobody works off is not ready, however well its models are."""
    assert await ready(client) == (200, "")
    client.state.batcher._task.cancel()
    await asyncio.wait([client.state.batcher._task])

    assert (await ready(client))[0] == 503


class TestLiveness:
    """The heart of a process is its batcher."""

    async def test_a_batcher_that_died(self, client: httpx.AsyncClient) -> None:
        """A queue that nobody works off makes the process not alive: only a restart helps."""
        assert (await client.get("/livez")).status_code == 200
        client.state.batcher._task.cancel()
        await asyncio.wait([client.state.batcher._task])
        answer = await client.get("/livez")

        assert (answer.status_code, answer.json()["code"]) == (503, "not_alive")
        assert answer.headers["content-type"] == "application/problem+json"

    async def test_a_chunk_that_does_not_end(self, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Alive while a chunk runs, not alive once it runs for longer than the limit, alive again when it has ended after all."""
        gate = threading.Event()

        def run(model: Model, counts: sp.csr_matrix, options: Options) -> Columns:
            gate.wait(10)
            return {"is_empty": Values(np.zeros(counts.shape[0], dtype=np.bool_))}

        async with serving(tiny_path, stall_seconds=0.3) as client:
            work = Work(client.state.models.get("tiny"), replace(TASKS["embed"], run=run), Options())
            running = asyncio.create_task(run_whole(client.state.batcher, work, counts(1)))
            await asyncio.sleep(0.05)
            assert (await client.get("/livez")).status_code == 200
            await asyncio.sleep(0.4)
            answer = await client.get("/livez")
            assert (answer.status_code, answer.json()["code"]) == (503, "not_alive")
            assert "CELLSERVE_STALL_SECONDS" in answer.json()["detail"]
            gate.set()
            await running
            assert (await client.get("/livez")).status_code == 200

    async def test_while_draining(self, client: httpx.AsyncClient) -> None:
        """A process that drains has stopped its batcher on purpose, and nobody shall restart it for that."""
        client.state.is_draining = True
        await client.state.batcher.stop()

        assert (await client.get("/livez")).status_code == 200


async def test_readiness_of_each_model(tmp_path: Path) -> None:
    """A model and each version say for themselves whether they answer; what is not there is 404."""
    for name, version in (("good", "1"), ("good", "2"), ("bad", "1")):
        write_artifact(tmp_path, name=name, version=version)
    for path in ("good/2", "bad/1"):
        (tmp_path / path / "encode.onnx").write_bytes(b"broken")
    store = Store(tmp_path)
    store.set_alias(store.resolve("good@1"))
    async with serving(tmp_path) as client:
        assert (await ready(client))[0] == 503
        good = await client.get("/v1/models/good/ready")
        assert (good.status_code, good.json()) == (200, {"status": "ready", "models": {"good@1": "ready"}})
        assert (await client.get("/v1/models/good/versions/default/ready")).status_code == 200
        for path, version in (("good/versions/2", "good@2"), ("bad", "bad@1")):
            answer = await client.get(f"/v1/models/{path}/ready")
            assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
            assert "encode.onnx" in answer.json()["models"][version]
            assert "encode.onnx" in answer.json()["detail"]
        for path in ("none", "good/versions/9", "good@1"):
            assert (await client.get(f"/v1/models/{path}/ready")).status_code == 404
        client.state.is_draining = True
        assert "shutting down" in (await client.get("/v1/models/good/ready")).json()["detail"]


async def test_the_exposition_parses(client: httpx.AsyncClient) -> None:
    """/metrics is what Prometheus' own parser reads; every family has help and our prefix, none a label for cells or genes."""
    for task in TASKS:
        await client.post(f"/v1/{task}", content=BODY, headers=JSON)
    answer = await client.get("/metrics")
    families = [
        family for family in text_string_to_metric_families(answer.text) if family.name.startswith("cellserve_")
    ]

    assert answer.headers["content-type"].startswith("text/plain")
    assert len(families) >= 12
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    assert labels - {"is_same"} == {  # of shadows, which other tests of this process may have had
        "route",
        "method",
        "status",
        "task",
        "stage",
        "code",
        "model",
        "version",
        "family",
        "provider",
        "lane",
        "column",
        "label",
        "outcome",
        "reason",
        "le",
    }
    for family in families:
        assert family.documentation
        assert not family.name.endswith(("_ms", "_milliseconds"))


async def test_buckets_begin_at_a_millisecond(client: httpx.AsyncClient) -> None:
    """Latency histograms resolve from 1 ms on, and rows from one cell on."""
    families = {family.name: family for family in text_string_to_metric_families((await client.get("/metrics")).text)}

    def first_bucket(name: str) -> float:
        bounds = [float(s.labels["le"]) for s in families[name].samples if s.name.endswith("_bucket")]
        assert max(bounds) == float("inf")
        return min(bounds)

    assert first_bucket("cellserve_stage_seconds") == 0.001
    assert first_bucket("cellserve_queue_wait_seconds") == 0.001
    assert first_bucket("cellserve_batch_rows") == 1


async def test_head(client: httpx.AsyncClient) -> None:
    """Probes may ask with HEAD; there is no body."""
    for path in ("/livez", "/readyz", "/metrics"):
        answer = await client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
