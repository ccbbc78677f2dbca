"""Making spans and sending them (OpenTelemetry's SDK). Imported only where traces are on; OTEL_* says how, see docs/traces.md."""

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Literal

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.json.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from service import metrics, tracing
from service.tracing import RequestTrace

MAX_LINKS = 4096
"""Requests in one batch: at most its rows. The SDK's own default would drop those beyond 128."""

FLUSH_SECONDS = 1.0
"""What the last spans have for leaving when the process ends; a collector that does not answer must not keep it."""

_PARENT_HEADERS = (b"traceparent", b"tracestate")
_propagator = TraceContextTextMapPropagator()


class Traces:
    """Makes spans, and sends them in a thread of its own from a bounded queue: what does not fit is lost, never waited for."""

    def __init__(self, exporter: SpanExporter) -> None:
        """Start the thread that exports. Sampler, limits and resource are read from OTEL_* by the SDK."""
        own_name = Resource({SERVICE_NAME: "cellserve"})
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
        resource = Resource.create().merge(own_name).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, span_limits=span_limits(), shutdown_on_exit=False)
        self._provider.sampler = _FollowLinks(self._provider.sampler)
        self._provider.add_span_processor(_Counting(_Counted(exporter)))
        self._tracer = self._provider.get_tracer("cellserve")

    def begin(
        self, name: str, headers: Iterable[tuple[bytes, bytes]], attributes: tracing.Attributes
    ) -> RequestTrace | None:
        """The trace of a request; None where it is not sampled.

        Args:
            name: of its span.
            headers: of the request; `traceparent` and `tracestate` say which trace it is part of.
            attributes: of its span.
        """
        carrier: dict[str, list[str]] = {}
        for key, value in headers:
            if key in _PARENT_HEADERS:
                carrier.setdefault(key.decode(), []).append(value.decode("latin-1"))
        if len(carrier.get("traceparent", ())) > 1:
            carrier = {}  # nobody knows which of them is meant
        # From the headers alone: the context that the server runs in may still be that of an earlier request of the connection.
        parent = _propagator.extract(carrier, Context())
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER, attributes=attributes)
        return RequestTrace(self._tracer, span) if span.is_recording() else None

    def stop(self, seconds: float = FLUSH_SECONDS) -> None:
        """Send what is left, in bounded time. Blocks."""
        ending = threading.Thread(target=self._provider.shutdown, name="cellserve-traces", daemon=True)
        ending.start()
        ending.join(seconds)


def span_limits() -> SpanLimits:
    """Limits of spans, from OTEL_*.

    Raises:
        ValueError: one of them is no number.
    """
    return SpanLimits(max_links=None if "OTEL_SPAN_LINK_COUNT_LIMIT" in os.environ else MAX_LINKS)


def make_exporter(name: Literal["otlp", "console"]) -> SpanExporter:
    """What sends spans: to a collector (OTLP over HTTP in JSON, endpoint and headers by OTEL_*), or as lines of JSON to standard output."""
    if name == "otlp":
        return OTLPSpanExporter()
    return ConsoleSpanExporter(formatter=lambda span: span.to_json(indent=None) + "\n")


class _FollowLinks(Sampler):
    """Samples a batch where a request in it is sampled, and everything else as another sampler says."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Decide for one span."""
        is_root = not get_current_span(parent_context).get_span_context().is_valid
        if is_root and any(link.context.trace_flags.sampled for link in links or ()):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, trace_state)
        return self._sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        """Name of the sampler."""
        return f"FollowLinks{{{self._sampler.get_description()}}}"


class _Counting(BatchSpanProcessor):
    """Counts the spans that are handed over."""

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span."""
        metrics.SPANS.labels("made").inc()
        super().on_end(span)


class _Counted(SpanExporter):
    """Counts what an exporter could send and what it could not."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            metrics.SPANS.labels("sent" if result is SpanExportResult.SUCCESS else "failed").inc(len(spans))
        return result

    def shutdown(self) -> None:
        """End."""
        self._exporter.shutdown()
