"""Traces: what belongs to which request, what ran together, and that neither a collector nor a long request can do harm."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from service import metrics, tracing
from service.inference.batcher import Batcher, run_whole
from service.inference.model import Model
from service.inference.task import Options
from service.inference.work import Work
from service.trace_export import Traces
from tests.builders import arrow_body, counts, gene_table, json_body
from tests.conftest import serving
from tests.service.inference.test_batcher import RecordingTask, rows

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
JSON = {"Content-Type": "application/json"}
GENES = gene_table().gene_symbol
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
STAGES = ["read", "parse_wait", "parse", "align", "queue", "compute", "serialise"]


class Recorder:
    """Traces whose spans end in a list."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.traces = Traces(self.exporter)

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        """What was exported, all of it sent; of that name if one is given."""
        self.traces._provider.force_flush()
        return [span for span in self.exporter.get_finished_spans() if name in (None, span.name)]

    def request(self) -> ReadableSpan:
        """The one request."""
        (span,) = [span for span in self.spans() if span.kind is SpanKind.SERVER]
        return span


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder()
    yield made
    made.traces.stop()


@pytest.fixture
async def traced(tiny_path: Path, recorder: Recorder) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that traces every request."""
    async with serving(tiny_path, traces=recorder.traces) as client:
        yield client


async def test_a_request_and_its_stages(traced: httpx.AsyncClient, recorder: Recorder) -> None:
    """One span per request, below it one per stage, in order and within it; nothing that the client sent stands in them."""
    answer = await traced.post(
        "/v1/embed?model=tiny", content=json_body(counts(3), GENES, ("a", "b", "c")), headers=JSON
    )
    request = recorder.request()
    stages = [span for span in recorder.spans() if span.parent is not None]

    assert answer.headers["traceresponse"] == f"00-{request.context.trace_id:032x}-{request.context.span_id:016x}-01"
    assert request.name == "POST /v1/embed"
    assert request.parent is None
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/embed",
        "http.response.status_code": 200,
        "cellserve.request_id": answer.headers["x-request-id"],
    }
    assert [span.name for span in sorted(stages, key=lambda span: span.start_time)] == STAGES
    assert {span.parent.span_id for span in stages} == {request.context.span_id}
    assert {span.context.trace_id for span in stages} == {request.context.trace_id}
    slack = 2_000_000  # two clocks, read one after the other
    for span in stages:
        assert request.start_time - slack <= span.start_time <= span.end_time <= request.end_time + slack
    for before, after in itertools.pairwise(sorted(stages, key=lambda span: span.start_time)):
        assert before.end_time <= after.start_time + slack
    said = "".join(span.to_json() for span in recorder.spans())
    assert not any(f'"{secret}"' in said for secret in (*GENES, "a", "b", "c"))


async def test_a_batch_and_its_requests(traced: httpx.AsyncClient, recorder: Recorder) -> None:
    """What ran is a trace of its own that links to the request, which links back; it says what ran and how full it was."""
    await traced.post("/v1/embed", content=json_body(counts(20), GENES), headers=JSON)
    request, (batch,), (compute,) = recorder.request(), recorder.spans("batch embed"), recorder.spans("compute")

    assert batch.parent is None
    assert batch.context.trace_id != request.context.trace_id
    assert [link.context for link in batch.links] == [request.context]
    assert [link.context for link in compute.links] == [batch.context]
    assert batch.attributes == {
        "cellserve.model": "tiny",
        "cellserve.version": "1",
        "cellserve.task": "embed",
        "cellserve.requests": 1,
        "cellserve.rows": 20,
        "cellserve.fill": 20 / 256,
        "cellserve.padding_rows": 64 - 20,
        "cellserve.reason": "idle",
    }
    assert compute.attributes["cellserve.chunks"] == 1


async def test_requests_that_run_together(recorder: Recorder, tiny: Model) -> None:
    """Requests that shared a run are all linked, each to its own trace, and one that is not sampled is not."""
    recording = RecordingTask()
    batcher, work = Batcher(batch_rows=256, max_queue_rows=1000), Work(tiny, recording.task(), Options())
    batcher.start()
    recording.gate.clear()

    async def ask(value: float, parent: bytes) -> tracing.RequestTrace | None:
        trace = recorder.traces.begin("POST", [(b"traceparent", parent)], {})
        tracing.current.set(trace)  # a task has a context of its own
        await run_whole(batcher, work, rows(value))
        return trace

    parents = [
        f"00-{number:032x}-{PARENT}-{flag}".encode() for number, flag in ((1, "01"), (2, "01"), (3, "00"), (4, "01"))
    ]
    first = asyncio.create_task(ask(0, parents[0]))
    while not batcher.running_seconds:
        await asyncio.sleep(0.001)
    others = [asyncio.create_task(ask(number, parent)) for number, parent in enumerate(parents[1:], start=1)]
    await asyncio.sleep(0.01)
    recording.gate.set()
    traces = await asyncio.gather(first, *others)
    await batcher.stop()
    alone, together = sorted(recorder.spans("batch record"), key=lambda span: span.start_time)

    assert traces[2] is None
    assert [f"{link.context.trace_id}" for link in alone.links] == ["1"]
    assert sorted(link.context.trace_id for link in together.links) == [2, 4]
    assert together.attributes["cellserve.requests"] == 3
    assert (alone.attributes["cellserve.reason"], together.attributes["cellserve.reason"]) == ("idle", "free")
    assert {f"{span.context.trace_id}" for span in recorder.spans("queue")} == {"1", "2", "4"}


@pytest.mark.parametrize(
    ("headers", "is_part"),
    [
        ({"traceparent": SAMPLED}, True),
        ({"traceparent": SAMPLED, "tracestate": "vendor=1"}, True),
        ({"traceparent": SAMPLED.upper()}, False),
        ({"traceparent": f"00-{'0' * 32}-{PARENT}-01"}, False),
        ({"traceparent": f"ff-{TRACE}-{PARENT}-01"}, False),
        ({"traceparent": "x" * 5_000}, False),
        ([("traceparent", SAMPLED), ("traceparent", SAMPLED)], False),
        ({}, False),
    ],
)
async def test_the_clients_trace(traced: httpx.AsyncClient, recorder: Recorder, headers, is_part: bool) -> None:
    """A usable traceparent makes the request part of that trace; any other header is as none."""
    answer = await traced.get("/v1/models", headers=headers)
    request = recorder.request()

    assert answer.status_code == 200
    assert (request.context.trace_id == int(TRACE, 16)) == is_part
    assert (request.parent is not None and request.parent.span_id == int(PARENT, 16)) == is_part


async def test_a_trace_that_is_not_sampled(traced: httpx.AsyncClient, recorder: Recorder) -> None:
    """Where the client's trace is not sampled nothing is made, neither for the request nor for its batch."""
    answer = await traced.post(
        "/v1/embed", content=json_body(counts(3), GENES), headers={**JSON, "traceparent": UNSAMPLED}
    )

    assert answer.status_code == 200
    assert "traceresponse" not in answer.headers
    assert recorder.spans() == []


async def test_probes_are_not_traced(traced: httpx.AsyncClient, recorder: Recorder) -> None:
    """Probes and scrapes make no spans, whatever they send."""
    for path in ("/livez", "/readyz", "/metrics", "/v2/health/live"):
        await traced.get(path, headers={"traceparent": SAMPLED})

    assert recorder.spans() == []


async def test_problems(traced: httpx.AsyncClient, recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """A problem carries the trace id; the span its code, and the state of an error only where the server is at fault."""
    answer = await traced.post("/v1/embed", content=b"{", headers={**JSON, "traceparent": SAMPLED})
    request = recorder.request()

    assert answer.json()["trace_id"] == TRACE
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    assert request.attributes["cellserve.problem"] == answer.json()["code"]
    assert request.status.is_unset

    traced.state.is_draining = True
    answer = await traced.post("/v1/embed", content=b"{}", headers=JSON)
    *_, request = [span for span in recorder.spans() if span.kind is SpanKind.SERVER]
    assert answer.status_code == 503
    assert (request.attributes["error.type"], request.status.is_ok) == ("shutting_down", False)


async def test_unknown_paths(traced: httpx.AsyncClient, recorder: Recorder) -> None:
    """Paths that do not exist share one name of a span."""
    for number in range(3):
        await traced.get(f"/wp-admin/{number}")

    assert {span.name for span in recorder.spans()} == {"GET unmatched"}


async def test_a_failing_run(recorder: Recorder, tiny: Model) -> None:
    """A run that failed is recorded as one."""
    recording = RecordingTask(poison=7.0)
    batcher = Batcher(batch_rows=256, max_queue_rows=1000)
    batcher.start()
    tracing.current.set(recorder.traces.begin("POST", [], {}))
    with pytest.raises(RuntimeError):
        await run_whole(batcher, Work(tiny, recording.task(), Options()), rows(7))
    await batcher.stop()
    (batch,) = recorder.spans("batch record")

    assert batch.attributes["error.type"] == "RuntimeError"
    assert not batch.status.is_ok
    assert len(batch.links) == 1


async def test_long_requests_make_few_spans(
    tiny_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that runs in many chunks, and one that streams many pieces, make a bounded number of spans, and say so."""
    monkeypatch.setattr(tracing, "MAX_STAGES", 5)
    matrix = counts(40)
    async with serving(tiny_path, traces=recorder.traces, batch_rows=1) as client:
        await client.post("/v1/embed", content=arrow_body(matrix, GENES), headers=ARROW)
        assert len(recorder.spans("batch embed")) == 5
        assert recorder.request().attributes["cellserve.spans_left_out"] == 35 + len(STAGES) - 5

        recorder.exporter.clear()
        body = arrow_body(matrix, GENES, rows_per_batch=2)
        answer = await client.post("/v1/embed", content=body, headers={**ARROW, "X-Cellserve-Stream": "1"})
        assert answer.status_code == 200
        assert len(recorder.spans()) == 1 + 5 + 5


async def test_off_costs_nothing(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where traces are off nothing is made, and a client's traceparent is of no account."""

    def refuse(*_: object) -> None:
        raise AssertionError("a span was made")

    monkeypatch.setattr(tracing.RequestTrace, "__init__", refuse)
    monkeypatch.setattr(tracing, "record_batch", refuse)
    answer = await client.post(
        "/v1/embed", content=json_body(counts(3), GENES), headers={**JSON, "traceparent": SAMPLED}
    )

    assert answer.status_code == 200
    assert "traceresponse" not in answer.headers


class Failing(SpanExporter):
    """An exporter that cannot send, in one of several ways."""

    def __init__(self, how: Callable[[], SpanExportResult]) -> None:
        self.how = how

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self.how()

    def shutdown(self) -> None:
        pass


def raises() -> SpanExportResult:
    raise OSError("the collector is gone")


@pytest.mark.parametrize("how", [raises, lambda: SpanExportResult.FAILURE])
async def test_a_collector_that_fails(tiny_path: Path, how: Callable[[], SpanExportResult]) -> None:
    """Requests are answered whatever becomes of their spans, and the loss is counted."""
    before = metrics.SPANS.labels("failed")._value.get()
    traces = Traces(Failing(how))
    async with serving(tiny_path, traces=traces) as client:
        answer = await client.post("/v1/embed", content=json_body(counts(3), GENES), headers=JSON)
        assert answer.status_code == 200
    traces.stop()

    assert metrics.SPANS.labels("failed")._value.get() - before == 2 + len(STAGES)


def test_a_collector_that_hangs() -> None:
    """The end of the process waits for a collector for a bounded time only, and the queue before it is bounded."""
    is_released = threading.Event()

    def hang() -> SpanExportResult:
        is_released.wait(30)
        return SpanExportResult.SUCCESS

    traces = Traces(Failing(hang))
    for _ in range(5_000):
        traces.begin("GET", [], {}).end({})
    started = time.monotonic()
    traces.stop(0.2)

    assert time.monotonic() - started < 2
    assert len(traces._provider._active_span_processor._span_processors[0]._batch_processor._queue) <= 2048
    is_released.set()


@pytest.mark.parametrize(("sampler", "n_requests"), [("always_off", 0), ("always_on", 3)])
async def test_the_sampler_of_the_environment(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, n_requests: int
) -> None:
    """OTEL_TRACES_SAMPLER decides about requests; batches follow the requests in them."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    recorder = Recorder()
    async with serving(tiny_path, traces=recorder.traces) as client:
        for _ in range(3):
            await client.post("/v1/embed", content=json_body(counts(3), GENES), headers=JSON)

    assert len(recorder.spans("POST /v1/embed")) == len(recorder.spans("batch embed")) == n_requests
    recorder.traces.stop()


def test_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service is called cellserve, unless OTEL_SERVICE_NAME says otherwise."""
    for name, environment in (("cellserve", {}), ("atlas", {"OTEL_SERVICE_NAME": "atlas"})):
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        recorder = Recorder()
        recorder.traces.begin("GET", [], {}).end({})
        assert recorder.spans()[0].resource.attributes["service.name"] == name
        recorder.traces.stop()
