"""How far long requests are: while they are answered, after their end, and for how long."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from service.api import request_id
from service.api.progress import KEPT_SECONDS, MAX_ENDED, Progress
from service.cells.columns import Columns
from service.errors import RequestNotFound
from service.inference import TASKS
from service.inference.model import Model
from service.inference.work import Work
from tests.builders import arrow_body, counts, gene_table, json_body
from tests.conftest import serving

GENES = gene_table().gene_symbol
JSON = {"Content-Type": "application/json"}
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def work(tiny: Model) -> Iterator[Work]:
    """Work of a request that is called "it"."""
    token = request_id.current.set("it")
    yield Work(tiny, TASKS["embed"], TASKS["embed"].options())
    request_id.current.reset(token)


def chunk(tiny: Model, n_cells: int) -> Columns:
    return TASKS["embed"].run(tiny, counts(n_cells), TASKS["embed"].options())


async def test_from_begin_to_end(tiny: Model, work: Work) -> None:
    """Numbers, rate and state of a request as its chunks come; after a minute it is not known any more."""
    clock = Clock()
    progress = Progress(clock)

    async def chunks() -> AsyncIterator[Columns]:
        for n_cells in (60, 40):
            clock.now += 2
            yield chunk(tiny, n_cells)

    followed = progress.follow(work, 100, chunks())
    await anext(followed)
    assert progress.of("it") == {
        "request_id": "it",
        "model": "tiny@1",
        "task": "embed",
        "state": "running",
        "n_cells": 100,
        "n_received": 100,
        "n_answered": 60,
        "seconds": 2,
        "cells_per_second": 30,
    }
    await anext(followed)
    clock.now += KEPT_SECONDS
    ended = progress.of("it")
    assert (ended["state"], ended["n_answered"], ended["seconds"], ended["cells_per_second"]) == ("done", 100, 4, 25)
    clock.now += 0.1
    with pytest.raises(RequestNotFound):
        progress.of("it")


async def test_a_request_that_fails(tiny: Model, work: Work) -> None:
    """An error, or a client that leaves, is a failure, with what was answered before it."""
    progress = Progress()

    async def chunks() -> AsyncIterator[Columns]:
        yield chunk(tiny, 5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        [_ async for _ in progress.follow(work, 100, chunks())]
    assert (progress.of("it")["state"], progress.of("it")["n_answered"]) == ("failed", 5)
    followed = progress.follow(work, 100, chunks())
    await anext(followed)
    await followed.aclose()  # type: ignore[attr-defined]
    assert progress.of("it")["state"] == "failed"


async def test_nothing_stays(work: Work) -> None:
    """A request that nobody holds any more is gone, however it went; of ends so many are known, the latest."""
    progress = Progress()
    watched = progress.begin(work)
    assert progress.of("it")["n_cells"] is None
    del watched
    gc.collect()
    with pytest.raises(RequestNotFound):
        progress.of("it")
    for number in range(MAX_ENDED + 10):
        token = request_id.current.set(str(number))
        with progress._ending(progress.begin(work)):
            request_id.current.reset(token)
    assert len(progress._ended) == MAX_ENDED
    with pytest.raises(RequestNotFound):
        progress.of("9")
    assert progress.of("10")["state"] == "failed"


async def test_two_requests_of_one_id(work: Work) -> None:
    """The later one is shown, and stays when the earlier one ends."""
    progress = Progress()
    first, second = progress.begin(work, 5), progress.begin(work, 7)
    with progress._ending(first):
        pass
    assert (progress.of("it")["n_cells"], progress.of("it")["state"]) == (7, "running")
    assert second.n_cells == 7


@pytest.mark.parametrize("name", ["plain-1", "with/slash=", "a:b+c"])
async def test_over_http(tiny_path: Path, name: str) -> None:
    """A long request, a streamed one and one of the Open Inference Protocol are known by their ids; a short one is not."""
    async with serving(tiny_path, batch_rows=32) as client:
        tracked = {**ARROW, "X-Request-ID": name}
        for body, headers, n_cells in (
            (arrow_body(counts(100), GENES), tracked, 100),
            (arrow_body(counts(7), GENES, rows_per_batch=3), {**tracked, "X-Cellserve-Stream": "1"}, 7),
        ):
            answer = await client.post("/v1/embed", content=body, headers=headers)
            assert answer.status_code == 200
            found = (await client.get(f"/v1/requests/{name}")).json()
            assert (found["state"], found["request_id"]) == ("done", name)
            assert found["n_cells"] == found["n_received"] == found["n_answered"] == n_cells
        await client.post("/v1/embed", content=json_body(counts(3), GENES), headers={**JSON, "X-Request-ID": "short"})
        missing = await client.get("/v1/requests/short")
        assert (missing.status_code, missing.json()["code"]) == (404, "request_not_found")


@pytest.mark.parametrize("name", ["%00", "a%20b", "..%2f..", "a" * 5000, "%C3%A4", "{x}"])
async def test_ids_that_no_request_has(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/v1/requests/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "request_not_found")


async def test_a_stream_that_breaks_off(tiny_path: Path) -> None:
    """Wrong cells after good ones: it failed, with those received and answered until then."""
    body = arrow_body(counts(60), GENES, rows_per_batch=20)
    async with serving(tiny_path) as client:
        headers = {**ARROW, "X-Cellserve-Stream": "1", "X-Request-ID": "cut"}
        await client.post("/v1/embed", content=body[:-8], headers=headers)
        found = (await client.get("/v1/requests/cut")).json()
        await asyncio.sleep(0)
    assert (found["state"], found["n_answered"], found["n_cells"]) == ("failed", 60, None)
