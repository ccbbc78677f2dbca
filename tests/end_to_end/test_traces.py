"""Traces of a real server, as a collector receives them over OTLP."""

import asyncio
import json
import re
import socket
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.builders import arrow_body, counts, gene_table
from tests.end_to_end.collector import Collector, attributes, collecting
from tests.end_to_end.server import Server, free_port

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
GENES = gene_table().gene_symbol
N_CONNECTIONS, N_REQUESTS = 6, 12


async def ask(server: Server, body: bytes) -> dict[str, str | None]:
    """Large requests over several keep-alive connections at a time; by request id, the trace that each said it is part of."""
    said: dict[str, str | None] = {}

    async def connection(number: int) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:
            for request in range(N_REQUESTS):
                request_id, headers = f"{number}-{request}", dict(ARROW)
                trace_id = f"{number + 1:016x}{request + 1:016x}" if request % 2 else None
                if trace_id is not None:
                    headers["traceparent"] = f"00-{trace_id}-00f067aa0ba902b7-01"
                answer = await client.post("/v1/embed", content=body, headers={**headers, "X-Request-ID": request_id})
                assert answer.status_code == 200
                given = answer.headers["traceresponse"].split("-")[1]
                assert trace_id in (None, given)
                said[request_id] = given

    await asyncio.gather(*(connection(number) for number in range(N_CONNECTIONS)))
    return said


async def test_each_request_has_its_own_trace(tiny_store: Path) -> None:
    """Bodies over 64 KiB on concurrent keep-alive connections: no request is part of another's trace.

    Each batch links to what ran in it, the log knows the same ids, and after SIGTERM nothing is missing.
    """
    body = arrow_body(counts(500), GENES)
    assert len(body) > 2**16
    with collecting() as collector:
        server = Server(
            tiny_store,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
        )
        try:
            server.start().wait_until_ready()
            said = await ask(server, body)
            assert await asyncio.to_thread(server.stop) == 0
            log = server.log()
        finally:
            server.close()

    check_requests(collector, said)
    check_batches(collector, said)
    logged = [json.loads(line) for line in log.splitlines() if '"/v1/embed"' in line]
    assert {line["request_id"]: line["trace_id"] for line in logged} == said
    resource = attributes(collector.resources[0])
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("cellserve", "test")
    assert not re.search(r'"(ENSG|G)\d', json.dumps(collector.spans))


def check_requests(collector: Collector, said: dict[str, str | None]) -> None:
    """One span per request in the trace that its answer named, with the stages below it."""
    requests = {attributes(span)["cellserve.request_id"]: span for span in collector.requests()}
    posts = {request_id: span for request_id, span in requests.items() if request_id in said}
    assert {request_id: span["traceId"] for request_id, span in posts.items()} == said
    assert len(set(said.values())) == N_CONNECTIONS * N_REQUESTS
    children = Counter(span.get("parentSpanId") for span in collector.spans)
    assert {children[span["spanId"]] for span in posts.values()} == {7}


def check_batches(collector: Collector, said: dict[str, str | None]) -> None:
    """Each request's rows are those of the batches that link to it, as far as they held only it; none links to a stranger."""
    batches = [span for span in collector.spans if span["name"] == "batch embed"]
    linked = {(link["traceId"], link["spanId"]) for span in batches for link in span["links"]}
    posts = {(span["traceId"], span["spanId"]) for span in collector.requests() if span["traceId"] in said.values()}
    assert linked == posts
    assert sum(int(attributes(span)["cellserve.rows"]) for span in batches) == 500 * len(said)
    assert not {span["traceId"] for span in batches} & set(said.values())


@pytest.mark.parametrize("is_listening", [False, True], ids=["refused", "silent"])
async def test_a_collector_that_does_not_answer(tiny_store: Path, is_listening: bool) -> None:
    """Whether a collector is gone or says nothing, requests are as fast as ever and the process ends in time, with success."""
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel accepts, and nobody ever reads
    port = silent.getsockname()[1] if is_listening else free_port()
    server = Server(
        tiny_store,
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"http://127.0.0.1:{port}/v1/traces",
        OTEL_BSP_SCHEDULE_DELAY="50",
    )
    try:
        await asyncio.to_thread(lambda: server.start().wait_until_ready())
        body = arrow_body(counts(3), GENES)
        async with httpx.AsyncClient(base_url=server.url) as client:
            for _ in range(50):
                answer = await client.post("/v1/embed", content=body, headers=ARROW)
                assert answer.status_code == 200
                assert answer.elapsed.total_seconds() < 2
        started = time.monotonic()
        assert await asyncio.to_thread(server.stop) == 0
        assert time.monotonic() - started < 10
    finally:
        server.close()
        silent.close()


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_SPAN_LINK_COUNT_LIMIT", "many")]
)
def test_wrong_variables(tiny_store: Path, name: str, value: str) -> None:
    """A variable that asks for what is not there stops the start and is named."""
    server = Server(tiny_store, **{"OTEL_TRACES_EXPORTER": "console", name: value})
    try:
        with pytest.raises(AssertionError):
            server.start().wait_until("/livez", seconds=20)
        assert name in server.log()
    finally:
        server.close()
