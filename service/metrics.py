"""Every counter, gauge and histogram with its buckets. Names of genes and cells never become labels.

Values live in the memory of the one worker: app.py takes away the PROMETHEUS_MULTIPROC_DIR that BentoML sets, with which
prometheus_client would write every change of every value to a file.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

Family = TypeVar("Family", bound=MetricWrapperBase)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
LIBRARY_SIZES = (0, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
DIFFERENCES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)
LANES = ("short", "long")
LOAD_OUTCOMES = ("loaded", "refused")
UNLOAD_REASONS = ("withdrawn", "least_recently_used")
CACHE_OUTCOMES = ("hit", "miss")
BUDGET_OUTCOMES = ("admitted", "refused", "slowed")
STAGES = ("read", "parse_wait", "parse", "align", "queue", "compute", "serialise")
REASONS = ("idle", "free", "full")
SPAN_OUTCOMES = ("made", "sent", "failed")


class CellHistogram:
    """A histogram of cells, of which thousands come at a time: prometheus_client's own takes one value per call."""

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> None:
        """Register an empty histogram; `buckets` are upper bounds in ascending order, without infinity."""
        self.name, self.documentation, self.labels = name, documentation, labels
        self.buckets = np.array(buckets)
        self._numbers: dict[tuple[str, ...], NDArray[np.int64]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        REGISTRY.register(self)

    def observe(self, labels: tuple[str, ...], values: NDArray[np.float32]) -> None:
        """Count cells, shape (n_cells,). Belongs to one event loop, as everything that calls it."""
        number = np.bincount(self.buckets.searchsorted(values, side="left"), minlength=len(self.buckets) + 1)
        self._numbers[labels] = self._numbers.get(labels, 0) + number
        self._sums[labels] = self._sums.get(labels, 0.0) + float(values.sum(dtype=np.float64))

    def remove_by_labels(self, labels: dict[str, str]) -> None:
        """Forget the series that have these labels, as prometheus_client's own metrics do."""
        for values in list(self._numbers):
            if all(values[self.labels.index(name)] == value for name, value in labels.items()):
                self._numbers.pop(values, None)
                self._sums.pop(values, None)

    def describe(self) -> Iterable[Metric]:
        """The family without its values."""
        return [HistogramMetricFamily(self.name, self.documentation, labels=self.labels)]

    def collect(self) -> Iterable[Metric]:
        """The family with its values so far."""
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.labels)
        bounds = [*map(floatToGoString, self.buckets.tolist()), "+Inf"]
        for labels, number in list(self._numbers.items()):  # `forget` belongs to another thread
            counts = [float(count) for count in np.cumsum(number)]
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), self._sums.get(labels, 0.0))
        return [family]


REQUESTS = Counter("cellserve_requests_total", "Requests, by route template and status.", ("route", "method", "status"))
REQUEST_SECONDS = Histogram(
    "cellserve_request_seconds",
    "From the first byte of a request to the last of its answer.",
    ("route",),
    buckets=SECONDS,
)
REQUESTS_IN_FLIGHT = Gauge("cellserve_requests_in_flight", "Requests being answered.")
STAGE_SECONDS = Histogram("cellserve_stage_seconds", "Time per request and stage.", ("task", "stage"), buckets=SECONDS)
REFUSED = Counter("cellserve_refused_total", "Requests that were answered with an error, by its code.", ("code",))
CELLS = Counter("cellserve_cells_total", "Cells answered.", ("model", "version", "task"))
SEND_SECONDS = Histogram(
    "cellserve_send_seconds",
    "Waiting for the client to take its answer.",
    ("route",),
    buckets=SECONDS,
)
BATCH_ROWS = Histogram("cellserve_batch_rows", "Cells that ran together.", ("task",), buckets=ROWS)
BATCHES = Counter(
    "cellserve_batches_total",
    "Runs of cells, by why they began: full (as many as may run together), free (what ran before had ended, and this is all that waited) or "
    "idle (nothing else ran).",
    ("task", "reason"),
)
BATCH_FILL = Histogram(
    "cellserve_batch_fill_ratio",
    "Cells that ran together, of those that might have (see CELLSERVE_BATCH_ROWS).",
    ("task",),
    buckets=SHARES,
)
BATCH_PADDING = Histogram(
    "cellserve_batch_padding_ratio",
    "Share of the rows which the graphs ran with that are no cells: they fill up a run to a size of fixed bits.",
    ("task",),
    buckets=SHARES,
)
BATCH_SECONDS = Histogram(
    "cellserve_batch_seconds", "Running cells together through all graphs of a task.", ("task",), buckets=SECONDS
)
QUEUE_ROWS = Gauge("cellserve_queue_rows", "Cells waiting to run.")
QUEUE_WAIT_SECONDS = Histogram(
    "cellserve_queue_wait_seconds",
    "From admission to the start of the first cell of a request, short (up to 64 cells) or long.",
    ("lane",),
    buckets=SECONDS,
)
MISSING_GENES = Histogram(
    "cellserve_missing_genes_ratio",
    "Share of the model's genes that a request lacks.",
    ("model", "version"),
    buckets=SHARES,
)
MISSING_WEIGHT = Histogram(
    "cellserve_missing_weight_ratio",
    "Share of the encoder's first layer that the genes which a request lacks hold.",
    ("model", "version"),
    buckets=SHARES,
)
LIBRARY_SIZE = CellHistogram(
    "cellserve_library_size", "Counts per cell in the genes of the model.", ("model", "version"), LIBRARY_SIZES
)
CONFIDENCE = CellHistogram(
    "cellserve_confidence_ratio",
    "Probability of the label that a cell was given.",
    ("model", "version", "column"),
    SHARES,
)
ENTROPY = CellHistogram(
    "cellserve_entropy_ratio",
    "Entropy of the probabilities of a cell's labels: 0 for one label that is certain, 1 where all are as probable.",
    ("model", "version", "column"),
    SHARES,
)
LABELS = Counter("cellserve_labels_total", "Cells that were given a label.", ("model", "version", "column", "label"))
REFERENCE_LIBRARY_SIZE = Gauge(
    "cellserve_reference_library_size",
    "Counts per cell of the reference in the genes of the model: mean and quantiles, to compare with what is sent.",
    ("model", "version", "quantile"),
)
REFERENCE_CONFIDENCE = Gauge(
    "cellserve_reference_confidence_ratio",
    "Probability of the label that a held-out cell of the reference is given: mean and quantiles.",
    ("model", "version", "column", "quantile"),
)
REFERENCE_ENTROPY = Gauge(
    "cellserve_reference_entropy_ratio",
    "Entropy of the probabilities of a held-out cell of the reference: mean and quantiles.",
    ("model", "version", "column", "quantile"),
)
REFERENCE_LABELS = Gauge(
    "cellserve_reference_labels_ratio",
    "Share of the cells of the reference that have a label.",
    ("model", "version", "column", "label"),
)
VERDICTS = Counter(
    "cellserve_query_verdicts_total",
    "Whole queries that were judged, by verdict: green, amber or red.",
    ("model", "version", "verdict"),
)
CANCELLED = Counter("cellserve_cancelled_total", "Requests whose client left before their answer was complete.")
CACHE_CELLS = Counter("cellserve_cache_cells_total", "Cells that the answer cache knew or not.", ("outcome",))
CACHE_EVICTIONS = Counter("cellserve_cache_evictions_total", "Cells that left the answer cache for want of room.")
CACHE_BYTES = Gauge("cellserve_cache_bytes", "Bytes of the answer cache: keys, answers and the table that finds them.")
CACHE_LOOKUP_SECONDS = Histogram(
    "cellserve_cache_lookup_seconds", "Making the keys of a request's cells and looking for them.", buckets=SECONDS
)
CLIENT_BUDGET = Counter(
    "cellserve_client_budget_total",
    "Requests by what the budget of their client said, and pieces of streams that had to wait for it.",
    ("outcome",),
)
CLIENT_KEYS = Gauge("cellserve_client_keys", "Clients whose budget is being kept.")
BODY_BYTES_IN_FLIGHT = Gauge("cellserve_body_bytes_in_flight", "Bytes of bodies held.")
UPLOAD_BYTES_IN_FLIGHT = Gauge(
    "cellserve_upload_bytes_in_flight", "Bytes of uploaded files, their counts and answers held on disk."
)
FILE_PROCESSES_ENDED = Counter(
    "cellserve_file_processes_ended_total",
    "Processes that read and write HDF5 files and ended, or had to be ended, at their work.",
)
MODEL_INFO = Gauge(
    "cellserve_model_info",
    "1 for each loaded version.",
    ("model", "version", "family", "provider"),
)
GRAPH_BYTES = Gauge(
    "cellserve_graph_bytes", "Bytes of the graphs of each loaded version, as files.", ("model", "version")
)
THREADS = Gauge("cellserve_threads", "Threads that may work side by side: on graphs, and on bodies.", ("pool",))
MODEL_FAILED = Gauge(
    "cellserve_model_failed",
    "1 for each version that could not be loaded.",
    ("model", "version"),
)
MODEL_LOADS = Counter(
    "cellserve_model_loads_total", "Versions that were read, verified and warmed up, or refused.", ("outcome",)
)
MODEL_LOAD_SECONDS = Histogram(
    "cellserve_model_load_seconds", "Reading, verifying and warming up a version.", buckets=SECONDS
)
MODEL_UNLOADS = Counter(
    "cellserve_model_unloads_total", "Versions that left memory: withdrawn, or least recently used.", ("reason",)
)
MODEL_SWAPS = Counter(
    "cellserve_model_swaps_total",
    "Times that another version became what a name, an alias or a split means.",
    ("model",),
)
MODELS_HELD = Gauge("cellserve_models_held", "Versions in memory, those included whose last requests still run.")
STORE_PROBLEM = Gauge(
    "cellserve_store_problem",
    "1 where the store asks for what cannot be served, so that what was served before stays; no model where the store cannot be read.",
    ("model",),
)
SHADOW_REQUESTS = Counter(
    "cellserve_shadow_requests_total",
    "Requests that a shadow version was to compute, too: compared, dropped (no time, too large) or failed.",
    ("model", "version", "outcome"),
)
SHADOW_CELLS = Counter(
    "cellserve_shadow_cells_total",
    "Cells whose answer by the shadow version was compared, by whether it is the same.",
    ("model", "version", "task", "column", "is_same"),
)
SHADOW_DIFFERENCE = CellHistogram(
    "cellserve_shadow_difference",
    "Largest difference between the numbers of a cell by the served and by the shadow version.",
    ("model", "version", "task", "column"),
    DIFFERENCES,
)
SPANS = Counter(
    "cellserve_spans_total",
    "Spans of traces: made, sent to the collector, or failed to be sent. What was made and is neither was dropped, or waits.",
    ("outcome",),
)
CONTENT_TYPE = CONTENT_TYPE_LATEST


COLLECTORS: tuple[MetricWrapperBase | CellHistogram, ...] = tuple(
    value for value in vars().values() if isinstance(value, MetricWrapperBase | CellHistogram)
)


def label_names(collector: MetricWrapperBase | CellHistogram) -> tuple[str, ...]:
    """The names of a metric's labels."""
    if isinstance(collector, CellHistogram):
        return collector.labels
    return tuple(collector._labelnames)  # the client has no public way to ask


def initialise(tasks: tuple[str, ...], codes: tuple[str, ...]) -> None:
    """Create the series of all tasks, lanes and error codes, so that a zero is exported and a rate can be taken from the first event on."""
    for task in tasks:
        for batches in (BATCH_ROWS, BATCH_FILL, BATCH_PADDING, BATCH_SECONDS):
            batches.labels(task)
        for reason in REASONS:
            BATCHES.labels(task, reason)
        for stage in STAGES:
            STAGE_SECONDS.labels(task, stage)
    for lane in LANES:
        QUEUE_WAIT_SECONDS.labels(lane)
    for code in codes:
        REFUSED.labels(code)
    for outcome in LOAD_OUTCOMES:
        MODEL_LOADS.labels(outcome)
    for reason in UNLOAD_REASONS:
        MODEL_UNLOADS.labels(reason)
    for outcome in CACHE_OUTCOMES:
        CACHE_CELLS.labels(outcome)
    for outcome in BUDGET_OUTCOMES:
        CLIENT_BUDGET.labels(outcome)
    for outcome in SPAN_OUTCOMES:
        SPANS.labels(outcome)


_series: dict[tuple[object, ...], Any] = {}


def series(metric: Family, *labels: str) -> Family:
    """As `metric.labels`, for what every request counts into: finding a series there takes longer than counting."""
    key = metric, *labels
    found: Family | None = _series.get(key)
    if found is None:
        found = _series[key] = metric.labels(*labels)
    return found


def forget(model: str, version: str) -> None:
    """Drop the series of a version that has left for good: each would stay for as long as the process lives."""
    for collector in COLLECTORS:
        if {"model", "version"} <= set(label_names(collector)):
            collector.remove_by_labels({"model": model, "version": version})
    _series.clear()  # also of this version, which would be counted into and exported no more, should it come back


def exposition() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
