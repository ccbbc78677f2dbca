"""Every counter, gauge and histogram with its buckets. Names of genes and cells never become labels.

Values live in the memory of the one worker: app.py takes away the PROMETHEUS_MULTIPROC_DIR that BentoML sets, with which
prometheus_client would write every change of every value to a file.
"""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LANES = ("short", "long")
STAGES = ("parse", "align", "queue", "compute", "serialise")

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
BATCH_ROWS = Histogram("cellserve_batch_rows", "Cells that ran together.", ("task",), buckets=ROWS)
QUEUE_ROWS = Gauge("cellserve_queue_rows", "Cells waiting to run.")
QUEUE_WAIT_SECONDS = Histogram(
    "cellserve_queue_wait_seconds",
    "From admission to the start of the first cell of a request, short (up to 64 cells) or long.",
    ("lane",),
    buckets=SECONDS,
)
CANCELLED = Counter("cellserve_cancelled_total", "Requests that left before their answer was complete.")
BODY_BYTES_IN_FLIGHT = Gauge("cellserve_body_bytes_in_flight", "Bytes of bodies held.")
MODEL_INFO = Gauge(
    "cellserve_model_info",
    "1 for each loaded version.",
    ("model", "version", "family", "provider"),
)
MODEL_FAILED = Gauge(
    "cellserve_model_failed",
    "1 for each version that could not be loaded.",
    ("model", "version"),
)
CONTENT_TYPE = CONTENT_TYPE_LATEST


def initialise(tasks: tuple[str, ...], codes: tuple[str, ...]) -> None:
    """Create the series of all tasks, lanes and error codes, so that a zero is exported and a rate can be taken from the first event on."""
    for task in tasks:
        BATCH_ROWS.labels(task)
        for stage in STAGES:
            STAGE_SECONDS.labels(task, stage)
    for lane in LANES:
        QUEUE_WAIT_SECONDS.labels(lane)
    for code in codes:
        REFUSED.labels(code)


def exposition() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
