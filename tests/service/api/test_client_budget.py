"""The budget of computing per client: who is one, what is charged, when it is refused, and that keys go nowhere."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
from starlette.requests import Request

from service.api.client_budget import ClientBudgets, client_of
from service.errors import ClientBudgetSpent
from tests.builders import arrow_body, counts, gene_table, json_body
from tests.conftest import serving

GENES = gene_table().gene_symbol
JSON = {"Content-Type": "application/json"}
STREAM = {"Content-Type": "application/vnd.apache.arrow.stream", "X-Cellserve-Stream": "1"}
BODY = json_body(counts(3), GENES)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(**headers: str) -> Request:
    """A request with these headers."""
    raw = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def test_who_is_a_client() -> None:
    """X-Client-Key before Authorization; who sends neither is one of many. The key cannot be read from what is kept."""
    key, bearer = request(X_Client_Key="lab-7"), request(Authorization="Bearer lab-7")
    both = request(X_Client_Key="lab-7", Authorization="Bearer other")

    assert client_of(key) == client_of(both) != client_of(bearer)
    assert client_of(request()) == client_of(request(X_Client_Key="")) == b""
    assert b"lab-7" not in client_of(key) + client_of(bearer)


def test_a_bucket() -> None:
    """It begins full, may be overdrawn, refuses until that is paid back, says when, and is never more than full."""
    clock = Clock()
    budgets = ClientBudgets(0.5, 10, 100, clock)
    budgets.admit(request(X_Client_Key="a"))
    charge = budgets.charge_to_current()
    charge(11)
    with pytest.raises(ClientBudgetSpent) as refused:
        budgets.admit(request(X_Client_Key="a"))
    assert (refused.value.overdrawn_seconds, refused.value.retry_after_seconds) == (1, 2)
    budgets.admit(request(X_Client_Key="b"))
    clock.now += refused.value.retry_after_seconds
    budgets.admit(request(X_Client_Key="a"))
    clock.now += 1_000
    budgets.admit(request(X_Client_Key="a"))
    charge(10.5)
    with pytest.raises(ClientBudgetSpent):
        budgets.admit(request(X_Client_Key="a"))


def test_the_long_run() -> None:
    """However greedy a client is, it gets its rate and what it began with."""
    clock, used = Clock(), 0.0
    budgets = ClientBudgets(0.25, 5, 100, clock)
    for _ in range(10_000):
        clock.now += 0.1
        try:
            budgets.admit(request(X_Client_Key="a"))
        except ClientBudgetSpent:
            continue
        budgets.charge_to_current()(0.3)
        used += 0.3

    assert used == pytest.approx(0.25 * 1_000 + 5, rel=0.01)


def test_keys_are_bounded() -> None:
    """Who has not been seen for longest is forgotten; who comes regularly is not, and keeps what it owes."""
    budgets = ClientBudgets(0.001, 10, 3, Clock())
    budgets.admit(request(X_Client_Key="owes"))
    budgets.charge_to_current()(11)
    for number in range(1_000):
        budgets.admit(request(X_Client_Key=str(number)))
        with pytest.raises(ClientBudgetSpent):
            budgets.admit(request(X_Client_Key="owes"))

    assert len(budgets._buckets) == 3


@pytest.fixture
async def client(tiny_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A server whose clients get one second of computing per hour."""
    async with serving(tiny_path, budgets=ClientBudgets(1 / 3600, 1e-9, 100), batch_rows=16) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/v1/embed", JSON, BODY),
        ("/v1/annotate", STREAM, arrow_body(counts(40), GENES)),
        (
            "/v2/models/tiny/infer",
            JSON,
            json.dumps(
                {"inputs": [{"name": "counts", "datatype": "FP32", "shape": [1, 40], "data": [1] * 40}]}
            ).encode(),
        ),
    ],
    ids=["whole", "stream", "infer"],
)
async def test_every_route(client: httpx.AsyncClient, path: str, headers: dict[str, str], body: bytes) -> None:
    """What was computed is charged, and the next request of this client is refused on every route, others' are not."""
    mine = {"X-Client-Key": "secret-of-mine"}
    first = await client.post(path, content=body, headers={**headers, **mine})
    assert first.status_code == 200, first.text
    refused = await client.post("/v1/embed", content=BODY, headers={**JSON, **mine})
    assert (refused.status_code, refused.json()["code"]) == (429, "client_budget_spent")
    assert int(refused.headers["retry-after"]) == refused.json()["retry_after_seconds"] >= 1
    again = await client.post(path, content=body, headers={**headers, **mine})
    assert again.status_code == 429
    other = await client.post(path, content=body, headers={**headers, "X-Client-Key": "another"})
    assert other.status_code == 200
    assert (await client.get("/v1/models", headers=mine)).status_code == 200


async def test_what_is_charged_is_computing(tiny_path: Path) -> None:
    """The seconds that chunks took, shared by rows among those that ran together: their sum is the time that the runtime worked."""
    budgets = ClientBudgets(1e-9, 100, 100)
    async with serving(tiny_path, budgets=budgets) as client:
        requests = [
            client.post("/v1/embed", content=json_body(counts(n_cells), GENES), headers={**JSON, "X-Client-Key": key})
            for key, n_cells in (("a", 1), ("b", 30), ("c", 200))
        ]
        await asyncio.gather(*requests)
        runs = client.state.batcher.runs["tiny@1"].values()  # type: ignore[attr-defined]
        charged = [100 - bucket.seconds for bucket in budgets._buckets.values()]

    assert len(charged) == 3
    assert min(charged) > 0
    assert sum(charged) == pytest.approx(sum(run.seconds for run in runs), rel=1e-3)


async def test_who_leaves_pays(tiny_path: Path) -> None:
    """What was computed for a client that has left is charged all the same."""
    budgets = ClientBudgets(1e-9, 100, 100)
    async with serving(tiny_path, budgets=budgets, batch_rows=64) as client:
        task = asyncio.create_task(client.post("/v1/embed", content=json_body(counts(600), GENES), headers=JSON))
        batcher = client.state.batcher  # type: ignore[attr-defined]
        while not batcher._tickets:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not batcher.is_idle:
            await asyncio.sleep(0.001)

    seconds = sum(run.seconds for run in batcher.runs["tiny@1"].values())
    assert 100 - budgets._buckets[b""].seconds == pytest.approx(seconds, rel=1e-3)


async def test_a_stream_is_slowed_down(tiny_path: Path) -> None:
    """A stream that has begun waits for its budget between its pieces, and is complete; where that would take too long it says so."""
    pieces = arrow_body(counts(300), GENES, rows_per_batch=100)
    async with serving(tiny_path, budgets=ClientBudgets(0.05, 1e-9, 100)) as client:
        answer = await client.post("/v1/embed", content=pieces, headers=STREAM)
        assert len(pa.ipc.open_stream(answer.content).read_all()) == 300
        metrics = (await client.get("/metrics")).text
    slowed = next(
        line for line in metrics.splitlines() if line.startswith('cellserve_client_budget_total{outcome="slowed"}')
    )
    assert float(slowed.split()[1]) >= 1
    async with serving(tiny_path, budgets=ClientBudgets(1e-6, 1e-9, 100), timeout_seconds=0.5) as client:
        answer = await client.post("/v1/embed", content=pieces, headers=STREAM)
    with pa.ipc.open_stream(answer.content) as reader:
        assert len(reader.read_next_batch()) == 100
        _, metadata = reader.read_next_batch_with_custom_metadata()
    assert json.loads(metadata[b"cellserve-problem"])["code"] == "client_budget_spent"


async def test_keys_are_written_nowhere(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in the log, nor in metrics, nor in the refusal."""
    caplog.set_level(logging.DEBUG)
    for _ in range(2):
        answer = await client.post("/v1/embed", content=BODY, headers={**JSON, "X-Client-Key": "very-secret-key"})
    assert answer.status_code == 429
    assert "very-secret-key" not in caplog.text + answer.text + (await client.get("/metrics")).text
    assert not any("very-secret-key" in str(vars(record)) for record in caplog.records)
