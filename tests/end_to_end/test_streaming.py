"""Streaming over one connection: the same bits, bounded memory on both sides, and clear ends."""

import json
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import anndata as ad
import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
import scipy.sparse as sp

from service.client import CellserveProblem, Client
from tests.builders import arrow_body
from tests.end_to_end.conftest import VERSION, many
from tests.end_to_end.server import Server

ARROW = "application/vnd.apache.arrow.stream"
STREAM = {"Content-Type": ARROW, "X-Cellserve-Stream": "1"}


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, cells_per_request=500) as client:
        yield client


def genes_of(cells: ad.AnnData) -> list[str]:
    return list(cells.var_names)


def latent(batches: list[pa.RecordBatch]) -> np.ndarray:
    return np.concatenate([batch.column("latent").flatten().to_numpy() for batch in batches])


def gauge(server: Server, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", httpx.get(server.url + "/metrics").text, re.MULTILINE)[1])


def worker(server: Server) -> psutil.Process:
    return max(psutil.Process(server.process.pid).children(recursive=True), key=lambda child: child.memory_info().rss)


def test_same_bits(server: Server, client: Client, cells: ad.AnnData) -> None:
    """Streamed cells have the bits that they have in a request, in the order sent, however they are cut."""
    counts = many(cells, 3_000)
    streamed = list(client.stream("embed", (counts[at : at + 700] for at in range(0, 3_000, 700)), genes_of(cells)))
    whole = httpx.post(
        server.url + "/v1/embed", content=arrow_body(counts, tuple(genes_of(cells))), headers={"Content-Type": ARROW}
    )

    assert latent(streamed).tobytes() == latent(pa.ipc.open_stream(whole.content).read_all().to_batches()).tobytes()
    head = json.loads(streamed[0].schema.metadata[b"cellserve"])
    assert head["model"] == {"name": "pbmc", "version": VERSION}
    assert head["genes"]["gene_overlap"] == 1.0


def test_expression_streams_as_the_latent_does(server: Server, client: Client, cells: ad.AnnData) -> None:
    """Of named genes at one library size: the bits of a request, piece by piece, and those of the whole genes."""
    counts, named = many(cells, 1_200), "MS4A1,LYZ,NKG7"
    sent = {"library_size": 1000, "batch": "pbmc3k"}
    pieces = [counts[at : at + 500] for at in range(0, 1_200, 500)]
    streamed = list(client.stream("reconstruct", iter(pieces), genes_of(cells), genes=named, **sent))
    answers = [
        httpx.post(
            server.url + "/v1/reconstruct",
            content=arrow_body(counts, tuple(genes_of(cells))),
            headers={"Content-Type": ARROW},
            params={**sent, **extra},
            timeout=60,
        )
        for extra in ({"genes": named}, {})
    ]
    some, whole = (pa.ipc.open_stream(answer.content).read_all() for answer in answers)
    found = np.concatenate([batch.column("expression").flatten().to_numpy() for batch in streamed])
    names = json.loads(whole.schema.field("expression").metadata[b"names"])
    everything = np.concatenate([chunk.flatten().to_numpy() for chunk in whole["expression"].chunks])
    chosen = everything.reshape(1_200, -1)[:, [names.index(gene) for gene in named.split(",")]]

    assert len(streamed) > 1
    assert json.loads(streamed[0].schema.field("expression").metadata[b"names"]) == named.split(",")
    assert found.tobytes() == np.concatenate([c.flatten().to_numpy() for c in some["expression"].chunks]).tobytes()
    assert found.tobytes() == np.ascontiguousarray(chosen).tobytes()


def test_memory_is_bounded(server: Server, client: Client, cells: ad.AnnData) -> None:
    """Many cells, more than one request may hold, pass through while both sides stay small."""
    counts = many(cells, 2_000)
    list(client.stream("embed", iter([counts]), genes_of(cells)))
    process, this = worker(server), psutil.Process()
    before, before_here = process.memory_info().rss, this.memory_info().rss
    n_cells, most, most_here = 0, 0, 0
    for batch in client.stream("embed", (counts for _ in range(75)), genes_of(cells)):
        n_cells += len(batch)
        most, most_here = max(most, process.memory_info().rss), max(most_here, this.memory_info().rss)

    assert n_cells == 150_000
    assert most - before < 200e6
    assert most_here - before_here < 200e6


def test_a_client_that_does_not_read(server: Server, client: Client, cells: ad.AnnData) -> None:
    """Work stops while nobody reads, takes no more memory, and ends with the connection."""
    counts = many(cells, 2_000)
    answers = client.stream("reconstruct", (counts for _ in range(1_000)), genes_of(cells))
    next(answers)
    time.sleep(2)
    before = worker(server).memory_info().rss
    time.sleep(2)
    assert worker(server).memory_info().rss - before < 50e6
    assert gauge(server, "cellserve_requests_in_flight") == 2  # and the one that asks
    answers.close()
    deadline = time.monotonic() + 20
    while gauge(server, "cellserve_requests_in_flight") > 1 and time.monotonic() < deadline:
        time.sleep(0.1)

    assert gauge(server, "cellserve_requests_in_flight") == 1
    assert gauge(server, "cellserve_queue_rows") == 0
    assert gauge(server, "cellserve_body_bytes_in_flight") == 0


def test_what_is_wrong_later(client: Client, cells: ad.AnnData) -> None:
    """Wrong cells after good ones: the good ones are answered, then the reason comes, with the place."""
    good, bad = many(cells, 400), many(cells, 100).astype(np.float32)
    bad.data[7] = 0.5
    answered: list[pa.RecordBatch] = []
    with pytest.raises(CellserveProblem) as problem:
        answered.extend(client.stream("embed", iter([good, good, bad, good]), genes_of(cells)))

    assert sum(map(len, answered)) == 800
    assert problem.value.code == "not_raw_counts"
    assert problem.value.document["n_cells_before"] == 800
    assert "from cell 800" in str(problem.value)


def test_what_is_wrong_at_once(client: Client, cells: ad.AnnData) -> None:
    """Before the first answer a refusal is an ordinary one, with its status."""
    with pytest.raises(CellserveProblem) as problem:
        list(client.stream("embed", iter([many(cells, 3)]), [f"nothing-{number}" for number in range(cells.n_vars)]))
    assert (problem.value.status, problem.value.code) == (422, "too_few_genes")
    with pytest.raises(CellserveProblem) as problem:
        list(client.stream("embed", iter([]), genes_of(cells)))
    assert problem.value.code in ("malformed_body", "empty_body")


def test_an_error_of_the_caller(client: Client, server: Server, cells: ad.AnnData) -> None:
    """What the caller's own iterator raises comes out of the stream, and the server is free again."""

    def broken() -> Iterator[sp.csr_matrix]:
        yield many(cells, 600)
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        list(client.stream("embed", broken(), genes_of(cells)))
    deadline = time.monotonic() + 10
    while gauge(server, "cellserve_requests_in_flight") > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gauge(server, "cellserve_body_bytes_in_flight") == 0


def test_a_stream_that_is_cut_off(server: Server, cells: ad.AnnData) -> None:
    """A body that ends without its end-of-stream marker is never answered as if it were whole."""
    body = arrow_body(many(cells, 10), tuple(genes_of(cells)))
    content: list[bytes] = []
    with (
        httpx.stream("POST", server.url + "/v1/embed", content=body[:-8], headers=STREAM) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        content.extend(answer.iter_raw())

    # The cells before the cut are answered; then comes the reason, and no end-of-stream marker.
    with pa.ipc.open_stream(b"".join(content)) as reader:
        assert len(reader.read_next_batch()) == 10
        _, metadata = reader.read_next_batch_with_custom_metadata()
    assert json.loads(metadata[b"cellserve-problem"])["code"] == "malformed_body"


def test_json_cannot_be_streamed(server: Server) -> None:
    for headers in ({**STREAM, "Content-Type": "application/json"}, {**STREAM, "Accept": "application/json"}):
        answer = httpx.post(server.url + "/v1/embed", content=b"{}", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_a_body_that_stops_coming(server: Server, cells: ad.AnnData) -> None:
    """A client that leaves in the middle leaves nothing behind."""
    address = urlsplit(server.url)
    body = arrow_body(many(cells, 200), tuple(genes_of(cells)))
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: {ARROW}\r\nX-Cellserve-Stream: 1\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[: len(body) // 2])
        time.sleep(0.3)
    deadline = time.monotonic() + 10
    while gauge(server, "cellserve_requests_in_flight") > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gauge(server, "cellserve_body_bytes_in_flight") == 0
