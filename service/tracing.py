"""Traces (OpenTelemetry): a span per request and its stages, and a span per batch that links to the requests in it.

Off, `current` is None wherever it is looked at, and nothing is made. On, only requests that are sampled have a `RequestTrace`. Spans of
stages are made afterwards, from the times that are taken for the metrics anyway. trace_export.py makes and sends.
"""

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode, Tracer, set_span_in_context

Attributes = Mapping[str, str | int | float]

MAX_STAGES = 64
"""Spans of stages that one request may have, and batches that may link to it: a streamed request of a million cells is part of thousands."""


class RequestTrace:
    """The spans of one sampled request. Belongs to the event loop."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        """Begin with the span of the request itself."""
        self.tracer, self.span = tracer, span
        self.problem: str | None = None
        """Code of the problem that it was answered with."""

        self._inside = set_span_in_context(span, Context())
        self._offset_ns = time.time_ns() - round(time.monotonic() * 1e9)
        self._n_stages = 0
        self._n_batches = 0

    @property
    def context(self) -> SpanContext:
        """Trace and span id."""
        return self.span.get_span_context()

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return f"{self.context.trace_id:032x}"

    @property
    def header(self) -> str:
        """The value of `traceresponse`, as W3C's Trace Context (level 2) writes it."""
        return f"00-{self.trace_id}-{self.context.span_id:016x}-{self.context.trace_flags & 1:02x}"

    def stage(
        self,
        name: str,
        began: float,
        ended: float,
        attributes: Attributes | None = None,
        batches: Sequence[SpanContext] = (),
    ) -> None:
        """Record a stage.

        Args:
            name: of the stage, as in the metrics.
            began: on the clock of `time.monotonic`, seconds; as `ended`.
            ended: not before `began`.
            attributes: what else is known of it.
            batches: spans of the batches that it was part of.
        """
        self._n_stages += 1
        if self._n_stages > MAX_STAGES:
            return
        span = self.tracer.start_span(
            name,
            context=self._inside,
            attributes=attributes,
            links=[Link(batch) for batch in batches],
            start_time=self.wall_ns(began),
        )
        span.end(self.wall_ns(ended))

    def lay(self, ended: float, seconds: Mapping[str, float]) -> None:
        """Record stages that followed each other without a gap, the last of which ended then."""
        began = ended - sum(seconds.values())
        for name, spent in seconds.items():
            self.stage(name, began, began + spent)
            began += spent

    def takes_batch(self) -> bool:
        """Whether one more batch may link to this request."""
        self._n_batches += 1
        return self._n_batches <= MAX_STAGES

    def end(self, attributes: Attributes, error: str | None = None) -> None:
        """End the span of the request, with what is known of it by now and, where it failed, the kind of its error."""
        left_out = max(0, self._n_stages - MAX_STAGES) + max(0, self._n_batches - MAX_STAGES)
        more = {"cellserve.spans_left_out": left_out} if left_out else {}
        self.span.set_attributes({**attributes, **more})
        if error is not None:
            self.span.set_attribute("error.type", error)
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()

    def wall_ns(self, clock: float) -> int:
        """Nanoseconds since 1970 of a moment on the clock of `time.monotonic`."""
        return round(clock * 1e9) + self._offset_ns


current: ContextVar[RequestTrace | None] = ContextVar("cellserve_trace", default=None)
"""Of the request that is being answered; None where it is not sampled, and always where traces are off."""


def record_batch(
    requests: Sequence[RequestTrace], name: str, began: float, ended: float, attributes: Attributes, error: str = ""
) -> SpanContext | None:
    """Record what ran together, as a trace of its own that links to the requests in it; None where nothing is to be recorded.

    Args:
        requests: those that are sampled.
        name: of the span.
        began: on the clock of `time.monotonic`; as `ended`.
        ended: not before `began`.
        attributes: of the span.
        error: class of the exception that it ended with.
    """
    linked = [request for request in requests if request.takes_batch()]
    if not linked:
        return None
    first = linked[0]
    span = first.tracer.start_span(
        name,
        context=Context(),
        attributes=attributes,
        links=[Link(request.context) for request in linked],
        start_time=first.wall_ns(began),
    )
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))
    span.end(first.wall_ns(ended))
    return span.get_span_context()
