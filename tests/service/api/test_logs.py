"""Logs: one JSON object per line, and never a gene, a cell id or a count, neither there nor in /metrics."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api import logs
from service.api.logs import JsonFormatter
from service.inference import TASKS
from tests.builders import arrow_body, counts, json_body

JSON = {"Content-Type": "application/json"}
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
# A real gene of the model is needed to be answered; its names occur in nothing else that is logged.
GENES = tuple(f"ENSG{number:011d}" for number in range(40))
SECRET_GENES = tuple(f"SECRETGENE{number}" for number in range(3))
SECRET_CELLS = tuple(f"PATIENT-{number}" for number in range(4))


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that this process logs, as the service writes it; the handlers of the test run are put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def wrong_bodies() -> list[tuple[bytes, dict[str, str]]]:
    """Bodies that are refused, each for another reason, and each with secrets in the place that is wrong."""
    half = counts(4) * 0.5
    cells = [dict.fromkeys(SECRET_GENES, 1)]
    return [
        (json_body(half, GENES, SECRET_CELLS), JSON),
        (arrow_body(half, GENES, SECRET_CELLS), ARROW),
        (arrow_body(half, GENES, SECRET_CELLS)[:-30], ARROW),
        (json.dumps({"genes": SECRET_GENES, "cells": cells}).encode(), JSON),
        (json.dumps({"genes": GENES, "cells": cells}).encode(), JSON),
        (json.dumps({"genes": GENES, "cells": [{GENES[0]: "SECRETGENE0"}]}).encode(), JSON),
        (json.dumps({"genes": GENES, "cells": [[1] * 40], "SECRETGENE": 1}).encode(), JSON),
        (json.dumps({"genes": [*GENES, 7], "cells": [], "cell_ids": SECRET_CELLS}).encode(), JSON),
        (b"cell,SECRETGENE0\nPATIENT-1,3\n", JSON),
        (b'{"SECRETGENE0": 1, "SECRETGENE0": 2}', JSON),
    ]


async def test_nothing_of_cells_in_logs_or_metrics(client: httpx.AsyncClient, log: io.StringIO) -> None:
    """Answered or refused for whatever reason, no gene name and no cell id that was sent stands in the log or in /metrics."""
    for task in TASKS:
        for body, headers in [(json_body(counts(4), GENES, SECRET_CELLS), JSON), *wrong_bodies()]:
            await client.post(f"/v1/{task}", content=body, headers=headers)
    await client.post("/v1/reconstruct?genes=SECRETGENE0", content=json_body(counts(1), GENES), headers=JSON)
    await client.post("/v1/embed?SECRETGENE0=PATIENT-0", content=json_body(counts(1), GENES), headers=JSON)
    await client.get("/v1/models/SECRETGENE0/versions/PATIENT-0")
    await client.get("/PATIENT-0?gene=SECRETGENE0")
    # Of our own loggers: httpx, in the same process here, logs the addresses that it asks.
    lines = [line for line in log.getvalue().splitlines() if json.loads(line)["logger"].startswith("cellserve")]
    text = "\n".join(lines) + (await client.get("/metrics")).text

    assert len(lines) >= len(TASKS) * 11 + 4
    assert not re.search(r"SECRET|PATIENT|ENSG\d", text)


async def test_a_line_per_request(client: httpx.AsyncClient, log: io.StringIO) -> None:
    """Each request is one line with route, method, status and seconds; probes and scrapes are not logged."""
    await client.post("/v1/embed", content=json_body(counts(1), GENES), headers=JSON)
    await client.get("/v1/models/tiny")
    for quiet in ("/livez", "/readyz", "/metrics"):
        await client.get(quiet)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    requests = [line for line in lines if line["logger"] == "cellserve.access"]

    assert [(line["route"], line["method"], line["status"], line["level"]) for line in requests] == [
        ("/v1/embed", "POST", 200, "info"),
        ("/v1/models/{name}", "GET", 200, "info"),
    ]
    assert all(line["seconds"] > 0 for line in requests)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in requests)


@given(message=st.text(), value=st.text() | st.floats() | st.none() | st.binary())
def test_one_line_whatever_is_logged(message: str, value: object) -> None:
    """Line breaks, quotes, percent signs, control characters and things that JSON does not know stay on one line of JSON."""
    record = logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "x", "thing": value})
    line = JsonFormatter().format(record)

    assert len(line.splitlines()) == 1
    assert json.loads(line)["event"] == message


def test_exceptions_are_on_the_line() -> None:
    """A trace is a member of the line, not lines of its own."""
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "levelname": "ERROR", "exc_info": sys.exc_info()})
    line = JsonFormatter().format(record)

    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def test_configure(monkeypatch: pytest.MonkeyPatch, log: io.StringIO) -> None:
    """All loggers, BentoML's and uvicorn's included, end in one handler that writes JSON to standard error at the level asked for."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    names = ("bentoml", "uvicorn", "uvicorn.error", "uvicorn.access")
    levels = {name: logging.getLogger(name).level for name in names}
    kept = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler(io.StringIO()))
    try:
        logs.configure("WARNING")
        logging.getLogger("cellserve.x").info("not this")
        logging.getLogger("cellserve.x").warning("this")
        logging.getLogger("uvicorn.error").warning("and this")
        logging.getLogger("uvicorn.access").info("not its own access lines")
    finally:
        for name in names:
            logger = logging.getLogger(name)
            logger.handlers[:], logger.propagate = kept[name]
            logger.setLevel(levels[name])

    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [(line["event"], line["level"], line["logger"]) for line in lines] == [
        ("this", "warning", "cellserve.x"),
        ("and this", "warning", "uvicorn.error"),
    ]
