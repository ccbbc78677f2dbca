"""A collector of traces for tests: takes OTLP over HTTP as JSON, and keeps the spans."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SERVER_KIND = 2
"""SPAN_KIND_SERVER of OTLP."""


class Collector:
    """Spans as OTLP writes them, and the attributes of who sent them."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.resources: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805 - names of http.server
                body = handler.rfile.read(int(handler.headers["content-length"]))
                if handler.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in json.loads(body)["resourceSpans"]:
                    self.resources.append(resource["resource"])
                    for scope in resource["scopeSpans"]:
                        self.spans += scope["spans"]
                handler.send_response(200)
                handler.send_header("content-length", "2")
                handler.end_headers()
                handler.wfile.write(b"{}")

            def log_message(handler, *_: Any) -> None:  # noqa: N805
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def requests(self) -> list[dict[str, Any]]:
        """Spans of requests."""
        return [span for span in self.spans if span["kind"] == SERVER_KIND]


def attributes(span: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a span or a resource."""
    return {entry["key"]: next(iter(entry["value"].values())) for entry in span["attributes"]}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens."""
    collector = Collector()
    thread = threading.Thread(target=collector._server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector._server.shutdown()
        collector._server.server_close()
        thread.join()
