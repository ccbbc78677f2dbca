"""Ten times the load that the server can bear: what it still answers, what it says to the rest, and whether its memory grows.

    make bench-overload

First the capacity: clients that ask again as soon as they have an answer, with as much at a time as keeps the server busy. Then requests
at ten times that rate, whether or not earlier ones were answered (open loop), each with X-Request-Timeout. Goodput counts cells of answers
that came whole and in time; every other status is counted by itself. Beside it single cells are asked for at a low rate, as by a person.

The load generator shares the CPUs with the server, so it is made to need little: requests are bytes made beforehand, one event loop of
uvloop with a parser in C, answers are not looked into, and connections are kept. A request has many cells (2,048) with few counts (16 of
the model's genes each, drawn from real cells): the encoder's work is that of any other cell, but ten times capacity stays some tens of
megabytes a second and a few hundred requests, so that it is the server's refusals that are tested and not the loopback device. --nonzero 0
sends whole cells. The generator is kept on one CPU and below the server's priority (nice 5, a third of its weight): it runs when it must
and is not what slows the server down. `offered` says whether it did reach the rate, `late_ms_p99` how late it was.

Making, sending and receiving such a load costs a machine this small a large part of its CPUs, whatever the server does with it. So the
capacity is also measured while the same load goes to another server that does nothing but refuse (refuser.py).
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import scipy.sparse as sp
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.embed_http import query_cells
from benchmarks.machine import machine
from benchmarks.raw_http import Answer, AnswerParser, request
from benchmarks.servers.clients import ARROW
from benchmarks.servers.start import running
from service.client import bodies
from service.contract import artifact
from service.contract.store import Store
from service.inference.model import load
from service.inference.session import choose_runtime
from tests.end_to_end.server import ROOT, Server, free_port

RESULT = Path(__file__).with_suffix(".json")
TIMES = 10
PERSON_RATE = 5.0
"""Requests of one cell a second."""

N_BUSY = 8
"""Clients of the closed loop."""

MAX_CONNECTIONS = 2_000
NICE = 5


class Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self) -> None:
        self._parser = AnswerParser(self._answered)
        self._waiting: asyncio.Future[Answer] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its classes

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self._parser.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self.transport = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(exc or ConnectionError("the server hung up"))

    def _answered(self, answer: Answer) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    async def ask(self, content: bytes) -> Answer:
        """Send a request and wait for its whole answer.

        Raises:
            OSError: the server hung up.
        """
        if self.transport is None:
            raise ConnectionError("the server hung up before the request")
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(content)
        return await self._waiting


@dataclass
class Pool:
    """Connections to one port; a new one where none is free."""

    port: int
    n_busy: int = 0
    free: list[Connection] = field(default_factory=list)

    async def ask(self, content: bytes) -> Answer:
        """Send a request over a free connection; one that was closed meanwhile is replaced.

        Raises:
            OSError: the server hung up, or MAX_CONNECTIONS are busy.
        """
        if self.n_busy >= MAX_CONNECTIONS:
            raise ConnectionError(f"{MAX_CONNECTIONS} requests are waiting")
        self.n_busy += 1
        try:
            connection = next((one for one in iter(self._take, None) if one.transport is not None), None)
            if connection is None:
                _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port)
            answer = await connection.ask(content)
        finally:
            self.n_busy -= 1
        self.free.append(connection)
        return answer

    def _take(self) -> Connection | None:
        return self.free.pop() if self.free else None


@dataclass
class Seen:
    """What became of one kind of request."""

    deadline: float
    sent: int = 0
    late: list[float] = field(default_factory=list)
    """Seconds by which each was sent after it was due."""

    accepted: list[float] = field(default_factory=list)
    """Seconds from when each was due to its whole answer."""

    retry_after: list[int] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    async def ask(self, pool: Pool, content: bytes, due: float) -> None:
        """Send one request and note what became of it."""
        self.sent += 1
        self.late.append(time.perf_counter() - due)
        try:
            answer = await pool.ask(content)
        except OSError as error:
            self.outcomes[f"no answer: {type(error).__name__}"] += 1
            return
        spent = time.perf_counter() - due
        retry_after = answer.headers.get("retry-after", "")
        if answer.status == 200:
            self.accepted.append(spent)
            self.outcomes["200 in time" if spent <= self.deadline else "200 too late"] += 1
        elif answer.status == 429 and retry_after.isdecimal() and int(retry_after) >= 1:
            self.retry_after.append(int(retry_after))
            self.outcomes["429 with Retry-After"] += 1
        else:
            self.outcomes[f"{answer.status} {_code(answer)}"] += 1

    def summary(self) -> dict[str, Any]:
        """Counts, and quantiles in milliseconds."""
        return {
            "sent": self.sent,
            "outcomes": dict(self.outcomes),
            "late_ms_p99": _milliseconds(self.late, 0.99),
            "accepted_ms_p50": _milliseconds(self.accepted, 0.5),
            "accepted_ms_p99": _milliseconds(self.accepted, 0.99),
            "retry_after_seconds": sorted(set(self.retry_after)),
        }


def _code(answer: Answer) -> str:
    try:
        return str(json.loads(bytes(answer.content))["code"])
    except (ValueError, KeyError):
        return "without a code"


def _milliseconds(seconds: list[float], share: float) -> float | None:
    return round(1e3 * float(np.quantile(seconds, share)), 1) if seconds else None


def make_requests(size: int, n_nonzero: int, deadline: float, n_requests: int = 4) -> tuple[list[bytes], bytes]:
    """Requests of `size` cells with at most `n_nonzero` counts each (0: all of them), and one of a single whole cell."""
    store = Store(ROOT / "models_store")
    model = load(artifact.read(store.path(store.resolve("pbmc"))), choose_runtime("cpu", None, allow_fallback=False))
    counts, genes = query_cells(model)
    path, headers = "/v1/embed?model=pbmc", {"X_Request_Timeout": str(deadline)}
    person = request(path, next(bodies(counts[:1], list(genes), 1)), ARROW, **headers)
    if n_nonzero:
        counts = thinned(counts, n_nonzero)
    # From the first cell again after the last, where they are fewer than the requests hold.
    pieces = (counts[np.arange(number * size, (number + 1) * size) % counts.shape[0]] for number in range(n_requests))
    return [request(path, next(bodies(piece, list(genes), size)), ARROW, **headers) for piece in pieces], person


def thinned(counts: sp.csr_matrix, n_nonzero: int) -> sp.csr_matrix:
    """Cells that keep `n_nonzero` of their counts, drawn at random; fewer where they have fewer."""
    generator = np.random.default_rng(0)
    is_kept = np.zeros(counts.nnz, bool)
    for first, last in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        is_kept[first + generator.permutation(last - first)[:n_nonzero]] = True
    n_kept = np.concatenate(([0], np.cumsum(is_kept)))
    kept = sp.csr_matrix((counts.data[is_kept], counts.indices[is_kept], n_kept[counts.indptr]), counts.shape)
    kept.sort_indices()
    return kept


async def capacity(pool: Pool, requests: list[bytes], size: int, seconds: float) -> float:
    """Cells a second of N_BUSY clients that ask without a pause; whoever is refused asks again at once."""
    n_answered, begin = 0, time.perf_counter()

    async def client(number: int) -> None:
        nonlocal n_answered
        while time.perf_counter() < begin + seconds:
            number += 1
            answer = await pool.ask(requests[number % len(requests)])
            n_answered += answer.status == 200

    await asyncio.gather(*(client(number) for number in range(N_BUSY)))
    return size * n_answered / (time.perf_counter() - begin)


async def at_rate(rate: float, seconds: float, send: Callable[[int, float], Awaitable[None]]) -> float:
    """Start `send(number, when it was due)` so many times a second, and wait for the last; seconds until the last was started."""
    begin, tasks = time.perf_counter(), set()
    for number in range(int(rate * seconds)):
        due = begin + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(send(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    spent = max(seconds, time.perf_counter() - begin)
    await asyncio.gather(*tasks)
    return spent


async def sample_memory(pid: int, samples: list[tuple[float, int]]) -> None:
    """Resident bytes of a process and its children, each second until cancelled."""
    begin = time.perf_counter()
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    while True:
        samples.append((time.perf_counter() - begin, sum(process.memory_info().rss for process in processes)))
        await asyncio.sleep(1)


async def capacity_beside(
    pool: Pool, refusing: Pool, requests: list[bytes], options: argparse.Namespace, rate: float
) -> float:
    """Capacity while others send `rate` requests a second to a server that refuses them all."""
    seen = Seen(options.deadline)
    load = at_rate(
        rate, options.capacity_seconds, lambda number, due: seen.ask(refusing, requests[number % len(requests)], due)
    )
    found, _ = await asyncio.gather(capacity(pool, requests, options.cells, options.capacity_seconds), load)
    assert set(seen.outcomes) == {"429 with Retry-After"}, seen.outcomes
    return found


async def measure(server: Server, refusing: Pool, options: argparse.Namespace) -> dict[str, Any]:
    """Capacity, by itself and beside a load that others refuse; then the overload."""
    assert server.process is not None
    requests, person = make_requests(options.cells, options.nonzero, options.deadline)
    pool = Pool(server.port)
    await capacity(pool, requests, options.cells, min(3.0, options.seconds))
    bearable = await capacity(pool, requests, options.cells, options.capacity_seconds)
    rate = options.times * bearable / options.cells
    beside = await capacity_beside(pool, refusing, requests, options, rate)
    bulk, people = Seen(options.deadline), Seen(options.deadline)
    samples: list[tuple[float, int]] = []
    sampler = asyncio.create_task(sample_memory(server.process.pid, samples))
    spent, _ = await asyncio.gather(
        at_rate(rate, options.seconds, lambda number, due: bulk.ask(pool, requests[number % len(requests)], due)),
        at_rate(PERSON_RATE, options.seconds, lambda _, due: people.ask(pool, person, due)),
    )
    sampler.cancel()
    after = await capacity(pool, requests, options.cells, options.capacity_seconds)
    goodput = options.cells * bulk.outcomes["200 in time"] / spent
    # The first quarter fills queues and buffers; what grows after it grows for ever.
    second, last = (
        [rss for when, rss in samples if low * spent <= when < high * spent] for low, high in ((0.25, 0.5), (0.75, 2))
    )
    return {
        "seconds": options.seconds,
        "times_capacity": options.times,
        "deadline_seconds": options.deadline,
        "cells_per_request": options.cells,
        "nonzero_per_cell": options.nonzero,
        "request_bytes": len(requests[0]),
        "capacity_cells_per_second": {"before": round(bearable), "after": round(after), "beside_load": round(beside)},
        "offered_cells_per_second": round(options.cells * bulk.sent / spent),
        "goodput_cells_per_second": round(goodput),
        "goodput_to_capacity": round(goodput / bearable, 3),
        "goodput_to_capacity_beside_load": round(goodput / beside, 3),
        "overload": bulk.summary(),
        "single_cells": people.summary(),
        "memory_mb": {
            "second_quarter": round(statistics.median(second) / 1e6) if second else None,
            "last_quarter": round(statistics.median(last) / 1e6) if last else None,
            "all": [round(rss / 1e6) for _, rss in samples],
        },
    }


def main() -> int:
    """Measure, print and write; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="of the overload")
    parser.add_argument("--capacity-seconds", type=float, default=10)
    parser.add_argument("--times", type=float, default=TIMES, help="of capacity")
    parser.add_argument("--cells", type=int, default=2_048, help="per request")
    parser.add_argument("--nonzero", type=int, default=16, help="counts kept of each cell; 0 for all")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds, in X-Request-Timeout")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `timeout` leaves no server behind
    about = {"machine": machine()}  # before the affinity changes, which it counts
    server = Server(ROOT / "models_store", CELLSERVE_LOG_LEVEL="WARNING")
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.refuser", str(port)]
    try:
        server.start().wait_until_ready()
        with tempfile.TemporaryDirectory() as folder, running(command, dict(os.environ), port, "/", Path(folder)):
            # After the servers have started, which would inherit both.
            os.nice(NICE)
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            result = about | uvloop.run(measure(server, Pool(port), options))
        server.stop()
    finally:
        server.close()
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    goals = missed(result)
    table = Table("figure", "value")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table, *goals or ["All goals are met."])
    return 1 if goals else 0


def missed(result: dict[str, Any]) -> list[str]:
    """The goals that were missed, in words."""
    limit = 1e3 * result["deadline_seconds"]
    allowed = {"200 in time", "429 with Retry-After"}
    goals = []
    if result["goodput_to_capacity"] < 0.9:
        goals.append(f"Goodput is {result['goodput_to_capacity']} of capacity, not 0.9.")
    for kind in ("overload", "single_cells"):
        if others := {name: n for name, n in result[kind]["outcomes"].items() if name not in allowed}:
            goals.append(f"{kind}: neither answered in time nor refused with 429: {others}.")
        if (p99 := result[kind]["accepted_ms_p99"]) is None or p99 > limit:
            goals.append(f"{kind}: p99 of accepted requests is {p99} ms, and the deadline {limit} ms.")
    if (first := result["memory_mb"]["second_quarter"]) and result["memory_mb"]["last_quarter"] > 1.05 * first:
        goals.append(f"Memory grew from {first} to {result['memory_mb']['last_quarter']} MB.")
    if (
        result["offered_cells_per_second"]
        < 0.9 * result["times_capacity"] * result["capacity_cells_per_second"]["before"]
    ):
        goals.append("The load generator did not reach the rate that it was to offer: the run says nothing.")
    return goals


if __name__ == "__main__":
    raise SystemExit(main())
