"""Logs: one JSON object per line on standard error, with the request id. Never a gene, a cell id or a count."""

import json
import logging
import sys
import time
from typing import Any

import orjson

from service import tracing
from service.api import request_id

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName", "asctime"}


class JsonFormatter(logging.Formatter):
    """Writes time, level, logger, event, request_id, trace_id where the request is traced, and whatever `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if (current := request_id.current.get()) is not None:
            line["request_id"] = current
        if (trace := tracing.current.get()) is not None:
            line["trace_id"] = trace.trace_id
        line |= {key: value for key, value in vars(record).items() if key not in _PLAIN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            encoded = orjson.dumps(line, default=str)
        except TypeError:  # half a surrogate pair, or an integer of more than 64 bits
            return json.dumps(line, default=str)
        # Escaped where there is more than ASCII: some of it ends a line for some readers.
        return encoded.decode() if encoded.isascii() else json.dumps(line, default=str)


def configure(level: str) -> None:
    """Send all logs of this process, BentoML's and uvicorn's included, to standard error as JSON."""
    # What no line says need not be looked up for each (https://docs.python.org/3/howto/logging.html#optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("bentoml", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # BentoML logs each of its hooks; uvicorn.access would repeat our own line, and makes none where nobody would hear it.
    logging.getLogger("bentoml").setLevel("WARNING")
    logging.getLogger("uvicorn.access").propagate = False
