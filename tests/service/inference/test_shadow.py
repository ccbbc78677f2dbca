"""A shadow version: differences are counted, and the request never notices."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client import REGISTRY

from service.cells.columns import LabelLists, Labels, Values, Vectors
from service.contract.store import ModelId, Store
from service.contract.traffic import Traffic
from service.inference import TASKS, shadow
from service.inference.shadow import differences
from tests.builders import arrow_body, counts, gene_table, write_artifact
from tests.conftest import serving

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
BODY = arrow_body(counts(100), gene_table().gene_symbol)


def make_store(root: Path, name: str, seed: int = 5, **arguments: Any) -> Store:
    """`name` with the version 1 that serves and the version 2 that is its shadow. Names differ by test: metrics live as long as the process."""
    write_artifact(root, name=name)
    write_artifact(root, name=name, version="2", seed=seed, **arguments)
    store = Store(root)
    store.set_alias(ModelId(name, "1"))
    store.set_traffic(name, Traffic(shadow="2"))
    return store


def value(name: str, **labels: str) -> float:
    """The value of one series, 0 if there is none."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def compared(name: str, outcome: str = "compared", at_least: float = 1) -> float:
    """How many requests had this outcome, once there are as many as expected, or after 5 s."""
    for _ in range(500):
        found = value("cellserve_shadow_requests_total", model=name, version="2", outcome=outcome)
        if found >= at_least:
            break
        await asyncio.sleep(0.01)
    return found


async def embed(client: httpx.AsyncClient, task: str = "embed") -> httpx.Response:
    """The answer to a hundred cells."""
    answer = await client.post(f"/v1/{task}", content=BODY, headers=ARROW)
    assert answer.status_code == 200
    return answer


async def test_another_model(tmp_path: Path) -> None:
    """Cells that get another answer by the shadow are counted, with how far it is; the served version's bits and name stay."""
    make_store(tmp_path, "other")
    async with serving(tmp_path) as client:
        answer = await embed(client)
        assert await compared("other") == 1
        client.state.models.store.set_traffic("other", Traffic())
        client.state.models.refresh()
        alone = await embed(client)

    labels = {"model": "other", "version": "2", "task": "embed"}
    assert answer.headers["x-cellserve-model"] == "other@1"
    assert value("cellserve_shadow_cells_total", **labels, column="latent", is_same="false") == 100
    assert value("cellserve_shadow_cells_total", **labels, column="is_empty", is_same="true") == 100
    assert value("cellserve_shadow_difference_count", **labels, column="latent") == 100
    assert value("cellserve_shadow_difference_bucket", **labels, column="latent", le="0.001") < 100
    assert answer.content[-800:] == alone.content[-800:]  # the head's request id differs, the cells do not


async def test_the_same_model(tmp_path: Path) -> None:
    """A shadow that is the same model has the same bits for each cell, labels included."""
    make_store(tmp_path, "same", seed=0)
    async with serving(tmp_path) as client:
        await embed(client, "annotate")
        assert await compared("same") == 1

    labels = {"model": "same", "version": "2", "task": "annotate"}
    assert value("cellserve_shadow_cells_total", **labels, column="predicted_labels", is_same="true") == 100
    assert value("cellserve_shadow_difference_bucket", **labels, column="conf_score", le="0.0") == 100
    assert not any(
        sample.name.endswith("_total")
        and sample.labels["model"] == "same"
        and sample.labels["is_same"] == "false"
        and sample.value
        for family in REGISTRY.collect()
        if family.name == "cellserve_shadow_cells"
        for sample in family.samples
    )


async def test_other_genes(tmp_path: Path) -> None:
    """The shadow aligns the cells to its own genes: it may be trained on others."""
    make_store(tmp_path, "genes", n_genes=30)
    async with serving(tmp_path) as client:
        await embed(client)
        assert await compared("genes") == 1


async def test_a_shadow_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in it is counted and logged, and the request is answered."""
    make_store(tmp_path, "failing")

    def broken(*_: Any) -> Any:
        raise RuntimeError("planted")

    async with serving(tmp_path) as client:
        monkeypatch.setattr(shadow, "prepare", broken)
        await embed(client)
        assert await compared("failing", "failed") == 1


async def test_a_shadow_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered as fast while the shadow stands still; what it cannot keep up with is dropped, and memory is bounded by that."""
    make_store(tmp_path, "hanging")
    gate = threading.Event()
    prepare = shadow.prepare
    monkeypatch.setattr(shadow, "prepare", lambda *arguments: gate.wait(20) and prepare(*arguments))
    async with serving(tmp_path) as client:
        async with asyncio.timeout(5):
            for _ in range(30):
                await embed(client)
        assert await compared("hanging", "dropped") == 30 - shadow.MAX_WAITING
        gate.set()
        assert await compared("hanging", at_least=shadow.MAX_WAITING) == shadow.MAX_WAITING


async def test_a_busy_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While cells wait for the runtime the shadow does not run, and gives up after a while."""
    make_store(tmp_path, "busy")
    monkeypatch.setattr(shadow, "PATIENCE_SECONDS", 0.1)
    async with serving(tmp_path) as client:
        client.state.batcher._n_queued += 1
        await embed(client)
        assert await compared("busy", "dropped") == 1
        client.state.batcher._n_queued -= 1
        await embed(client)
        assert await compared("busy") == 1


async def test_a_large_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body beyond the bound is answered and not kept for the shadow."""
    make_store(tmp_path, "large")
    monkeypatch.setattr(shadow, "MAX_BODY_BYTES", len(BODY) - 1)
    async with serving(tmp_path) as client:
        await embed(client)
        assert await compared("large", "dropped") == 1


async def test_options_and_tasks_that_the_shadow_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that fails on the shadow only is the shadow's failure."""
    make_store(tmp_path, "lacking")
    task = TASKS["embed"]

    async with serving(tmp_path) as client:
        run = task.run

        def fails(model: Any, rows: Any, options: Any) -> Any:
            if model.manifest.version == "2":
                raise KeyError("no such graph")
            return run(model, rows, options)

        object.__setattr__(task, "run", fails)
        try:
            await embed(client)
            assert await compared("lacking", "failed") == 1
        finally:
            object.__setattr__(task, "run", run)


def test_differences() -> None:
    """Labels by their word, vectors by their farthest component, NaN as far as can be; what cannot be compared is left out."""
    served = {
        "label": Labels(np.array([0, 1, 2], dtype=np.int32), ("B", "T", "NK")),
        "vector": Vectors(np.array([[0, 1], [2, 3], [4, np.nan]], dtype=np.float32)),
        "flag": Values(np.array([True, False, True])),
        "named": Vectors(np.zeros((3, 2), dtype=np.float32), ("a", "b")),
        "wide": Vectors(np.zeros((3, 2), dtype=np.float32)),
        "near": LabelLists(np.array([[0, 1], [1, 1], [0, 0]], dtype=np.int32), ("a", "b")),
        "fewer": LabelLists(np.zeros((3, 2), dtype=np.int32), ("a",)),
        "one": Labels(np.zeros(3, dtype=np.int32), ("a",)),
        "only": Values(np.zeros(3, dtype=np.float32)),
    }
    other = {
        "label": Labels(np.array([1, 1, 2], dtype=np.int32), ("T", "B", "NK")),
        "vector": Vectors(np.array([[0, 1], [2, 3.5], [4, 0]], dtype=np.float32)),
        "flag": Values(np.array([True, True, True])),
        "named": replace(served["named"], names=("b", "a")),
        "wide": Vectors(np.zeros((3, 3), dtype=np.float32)),
        "near": LabelLists(np.array([[1, 0], [0, 1], [1, 1]], dtype=np.int32), ("b", "a")),
        "fewer": LabelLists(np.zeros((3, 1), dtype=np.int32), ("a",)),
        "one": LabelLists(np.zeros((3, 1), dtype=np.int32), ("a",)),
    }
    found = differences(served, other)

    assert set(found) == {"label", "vector", "flag", "near"}
    assert (found["near"][0].tolist(), found["near"][1]) == ([True, False, True], None)
    assert found["label"][0].tolist() == [True, False, True]
    assert found["vector"][0].tolist() == [True, False, False]
    assert found["vector"][1] is not None
    assert found["vector"][1].tolist() == [0.0, 0.5, np.inf]
    assert found["flag"][0].tolist() == [True, False, True]
