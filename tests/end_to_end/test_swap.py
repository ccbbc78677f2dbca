"""Versions exchanged under a real server while clients ask it: no request fails, and each answer is wholly of the version that it names."""

import asyncio
import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from service.client import Client, read_answer
from service.contract.store import ModelId, Store
from service.contract.traffic import Split, Traffic
from tests.builders import arrow_body, counts, gene_table, write_artifact, write_mismatch
from tests.end_to_end.server import Server, until

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
GENES = gene_table().gene_symbol
BODY = arrow_body(counts(50), GENES)
POLL = {"CELLSERVE_STORE_POLL_S": "0.05"}
TOKEN = "a token of some length"
Start = Callable[..., Server]


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Start:
    """Start a server of a store with settings, and wait until it is ready; ended with the test."""

    def start(store: Path, **environment: str) -> Server:
        server = Server(store, **environment)
        request.addfinalizer(server.close)
        return server.start().wait_until_ready()

    return start


def latent_of(content: bytes) -> bytes:
    """The bits of the latents of an answer."""
    return read_answer(content).column("latent").combine_chunks().flatten().to_numpy().tobytes()


@contextlib.asynccontextmanager
async def load(server: Server, query: str = "?model=tiny", n_clients: int = 6) -> AsyncIterator[list[httpx.Response]]:
    """Clients that embed without a pause; every answer, and what broke off raises."""
    answers: list[httpx.Response] = []
    is_over = False

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            while not is_over:
                answers.append(await client.post(f"/v1/embed{query}", content=BODY, headers=ARROW))

    clients = [asyncio.create_task(ask()) for _ in range(n_clients)]
    try:
        yield answers
    finally:
        is_over = True
        await asyncio.gather(*clients)


def check(answers: list[httpx.Response]) -> Counter[str]:
    """No request failed, and each version has one set of bits; how many answers each gave."""
    assert {answer.status_code for answer in answers} == {200}
    bits: dict[str, set[bytes]] = {}
    for answer in answers:
        table = read_answer(answer.content)
        named = json.loads(table.schema.metadata[b"cellserve"])["model"]
        version = answer.headers["x-cellserve-model"]
        assert version == f"{named['name']}@{named['version']}"
        bits.setdefault(version, set()).add(latent_of(answer.content))
    assert all(len(kinds) == 1 for kinds in bits.values())
    assert len(set.union(*bits.values())) == len(bits)  # versions differ
    return Counter(answer.headers["x-cellserve-model"] for answer in answers)


async def test_exchange_under_load(start: Start, tiny_store: Path) -> None:
    """Eight new versions by rename and alias, old ones removed meanwhile: every request is answered, by one version wholly."""
    store, server = Store(tiny_store), start(tiny_store, **POLL)
    async with load(server) as answers:
        await until(lambda: bool(answers))
        for version in range(3, 11):
            await asyncio.to_thread(write_artifact, tiny_store, version=str(version), seed=version)
            store.set_alias(ModelId("tiny", str(version)))
            n_before = len(answers)
            await until(
                lambda wanted=f"tiny@{version}", n_before=n_before: any(
                    answer.headers.get("x-cellserve-model") == wanted for answer in answers[n_before:]
                )
            )
            shutil.rmtree(tiny_store / "tiny" / str(version - 2))
        # Of the versions whose files are gone only what requests hold is left, and that for a moment.
        await until(lambda: server.metric("cellserve_models_held") == 2)
    answered = check(answers)

    assert set(answered) == {f"tiny@{version}" for version in (1, *range(3, 11))}
    assert server.metric(r'cellserve_model_swaps_total\{model="tiny"\}') == 8
    assert (
        server.metric(r'cellserve_refused_total\{code="(?!not_ready).*"\}') == 0
    )  # not ready: probes while it started


async def test_reload_by_call(start: Start, tiny_store: Path) -> None:
    """Without polling nothing changes until the admin call, which returns when the new version answers."""
    server = start(tiny_store, CELLSERVE_ADMIN_TOKEN=TOKEN)
    async with load(server, n_clients=3) as answers:
        write_artifact(tiny_store, version="3", seed=6)
        Store(tiny_store).set_alias(ModelId("tiny", "3"))
        await asyncio.sleep(0.5)
        assert check(answers).keys() == {"tiny@1"}
        async with httpx.AsyncClient(base_url=server.url) as client:
            refused = await client.post("/v1/admin/reload")
            done = await client.post("/v1/admin/reload", headers={"Authorization": f"Bearer {TOKEN}"})
            after = await client.post("/v1/embed", content=BODY, headers=ARROW)
    assert (refused.status_code, done.status_code) == (401, 200)
    assert after.headers["x-cellserve-model"] == "tiny@3"
    assert check(answers).keys() == {"tiny@1", "tiny@3"}
    assert TOKEN not in server.log()


async def test_a_bad_version_is_refused(start: Start, tiny_store: Path) -> None:
    """A broken file and a golden mismatch: the default stays and answers, and list, log and metrics say what is wrong."""
    server, store = start(tiny_store, **POLL), Store(tiny_store)
    async with load(server, n_clients=3) as answers:
        for version in ("3", "4"):
            if version == "3":
                # Broken before it appears: the server may look while a file is being written.
                path = write_artifact(tiny_store.parent / "aside", version=version, seed=6)
                (path / "encode.onnx").write_bytes(b"broken")
                path.rename(tiny_store / "tiny" / version)
            else:
                write_mismatch(tiny_store, version=version, seed=7)
            store.set_alias(ModelId("tiny", version))
            pattern = rf'cellserve_model_failed\{{model="tiny",version="{version}"\}}'
            await until(lambda pattern=pattern: server.metric(pattern) == 1)
        await asyncio.sleep(0.3)
    assert check(answers).keys() == {"tiny@1"}

    document = httpx.get(server.url + "/v1/models").json()
    states = {entry["version"]: entry["state"] for entry in document["models"]}
    assert (states["1"], states["2"]) == ("ready", "ready")
    assert "encode.onnx" in states["3"]
    assert "golden cells differs" in states["4"]
    assert "it still is tiny@1" in document["problems"]["tiny"]
    assert server.metric(r'cellserve_store_problem\{model="tiny"\}') == 1
    assert server.log().count("model refused") == 2  # not at every look
    assert httpx.get(server.url + "/readyz").status_code == 200
    assert httpx.get(server.url + "/v1/models/tiny/ready").status_code == 200
    assert httpx.get(server.url + "/v1/models/tiny/versions/4/ready").status_code == 503


async def test_split_shadow_and_client(start: Start, tiny_store: Path) -> None:
    """The split's share, repeatably; a shadow beside it that reports and does not show; a data set is answered by one version."""
    store = Store(tiny_store)
    write_artifact(tiny_store, version="3", seed=6)
    store.set_alias(ModelId("tiny", "2"), "canary")
    server = start(tiny_store, **POLL)
    store.set_traffic("tiny", Traffic(split=Split(to="canary", share=0.3), shadow="3"))
    await until(
        lambda: (
            "canary"
            in httpx.get(server.url + "/v1/models").json()["traffic"].get("tiny", {}).get("split", {}).get("to", "")
        )
    )

    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:

        async def ask(number: int) -> httpx.Response:
            return await client.post("/v1/embed", content=BODY, headers={**ARROW, "X-Request-ID": f"id-{number}"})

        rounds = [[await ask(number) for number in range(200)] for _ in range(2)]
    answered = [[answer.headers["x-cellserve-model"] for answer in answers] for answers in rounds]
    assert answered[0] == answered[1]
    assert check(rounds[0] + rounds[1]).keys() == {"tiny@1", "tiny@2"}
    assert 30 < answered[0].count("tiny@2") < 90  # 60 expected; 4.6 standard deviations

    labels = r'column="latent",is_same="false",model="tiny",task="embed",version="3"'
    await until(lambda: server.metric(rf"cellserve_shadow_cells_total\{{{labels}\}}") >= 50)
    assert server.metric(r'cellserve_shadow_requests_total\{.*outcome="failed".*\}') == 0

    adata = ad.AnnData(counts(50), var=pd.DataFrame(index=list(GENES)))
    latents = {latent_of(answer.content) for answer in rounds[0]}
    with Client(server.url, cells_per_request=5) as client:
        for _ in range(8):  # ten pieces each: of one version by chance once in fifty
            assert np.ascontiguousarray(client.embed(adata).obsm["X_tiny"]).tobytes() in latents


async def test_two_processes_agree(start: Start, tiny_store: Path) -> None:
    """Servers of one store follow it each for itself, and give the same bits under the same name."""
    servers = [start(tiny_store, **POLL) for _ in range(2)]
    write_artifact(tiny_store, version="3", seed=6)
    Store(tiny_store).set_alias(ModelId("tiny", "3"))

    def embedded(server: Server) -> httpx.Response:
        return httpx.post(server.url + "/v1/embed", content=BODY, headers=ARROW)

    await until(lambda: all(embedded(server).headers["x-cellserve-model"] == "tiny@3" for server in servers))
    assert len({latent_of(embedded(server).content) for server in servers}) == 1


async def test_bounded_memory(start: Start, tmp_path: Path) -> None:
    """Five models and room for two: all answer under load, with the bits that they have alone, and no more than two stay in memory."""
    names = [f"model{number}" for number in range(5)]
    for number, name in enumerate(names):
        write_artifact(tmp_path, name=name, seed=number)
    alone = start(tmp_path)
    bits = {
        name: latent_of(httpx.post(f"{alone.url}/v1/embed?model={name}", content=BODY, headers=ARROW).content)
        for name in names
    }
    assert len(set(bits.values())) == 5
    assert alone.stop() == 0
    server = start(tmp_path, CELLSERVE_MAX_LOADED="2")
    async with contextlib.AsyncExitStack() as stack:
        loads = [await stack.enter_async_context(load(server, f"?model={name}", n_clients=1)) for name in names]
        await asyncio.sleep(1)
        await until(lambda: min(map(len, loads)) >= 5)
    for name, answers in zip(names, loads, strict=True):
        assert {answer.status_code for answer in answers} == {200}
        assert {latent_of(answer.content) for answer in answers} == {bits[name]}
    states = httpx.get(server.url + "/readyz").json()["models"]
    assert Counter(states.values()) == {"ready": 2, "unloaded": 3}
    await until(lambda: server.metric("cellserve_models_held") == 2)
    assert server.metric(r'cellserve_model_unloads_total\{reason="least_recently_used"\}') > 3


class TestDrain:
    """SIGTERM while work is in flight."""

    async def test_new_work_is_refused_and_old_completes(self, start: Start, tiny_store: Path) -> None:
        """Not ready, 503 and Connection: close on new connections, every accepted request whole, exit code 0 in bounded time."""
        server = start(tiny_store, CELLSERVE_BATCH_ROWS="1")
        body = arrow_body(counts(3_000), GENES)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            work = [asyncio.create_task(client.post("/v1/reconstruct", content=body, headers=ARROW)) for _ in range(3)]
            await until(lambda: server.metric("cellserve_requests_in_flight") >= 4)
            await until(lambda: server.metric("cellserve_queue_rows") > 0)
            server.process.terminate()
            await until(lambda: httpx.get(server.url + "/readyz").status_code == 503)
            refused = httpx.post(server.url + "/v1/embed", content=BODY, headers=ARROW)
            alive = httpx.get(server.url + "/livez")
            listed = httpx.get(server.url + "/v1/models")
            answers = await asyncio.gather(*work)

        assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
        assert refused.headers["connection"] == listed.headers["connection"] == "close"
        assert alive.status_code == 200
        assert [answer.status_code for answer in answers] == [200] * 3
        for answer in answers:
            with pa.ipc.open_stream(answer.content) as reader:
                assert reader.read_all().num_rows == 3_000
        assert await asyncio.to_thread(server.stop) == 0

    async def test_a_client_that_does_not_read(self, start: Start, tiny_store: Path) -> None:
        """Work that does not come to its end is given up after CELLSERVE_DRAIN_SECONDS, and the process ends."""
        server = start(tiny_store, CELLSERVE_DRAIN_SECONDS="1")
        body = arrow_body(counts(50_000), GENES)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST /v1/reconstruct HTTP/1.1\r\nHost: x\r\nContent-Type: {ARROW['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        began = asyncio.get_running_loop().time()
        await asyncio.to_thread(server.stop, 15)
        assert asyncio.get_running_loop().time() - began < 10
        assert "not all work could be completed" in server.log()
        writer.close()

    async def test_the_whole_group_is_told(self, start: Start, tiny_store: Path) -> None:
        """An idle server whose every process gets the signal, as systemd does it, ends at once."""
        server = start(tiny_store)
        os.killpg(server.process.pid, 15)
        began = asyncio.get_running_loop().time()
        await asyncio.to_thread(server.process.wait, 15)
        assert asyncio.get_running_loop().time() - began < 10
