"""What an operator sees of a real server: metrics, logs, problems on every route."""

import json
import re
import threading
from collections.abc import Iterator

import anndata as ad
import httpx
import pytest
import scipy.sparse as sp
from prometheus_client.parser import text_string_to_metric_families

from service.client import CellserveProblem, Client
from service.inference import TASKS
from tests.builders import arrow_body
from tests.end_to_end.conftest import VERSION
from tests.end_to_end.server import Server, until

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}


def samples(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples of /metrics by name and labels."""
    families = text_string_to_metric_families(httpx.get(server.url + "/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_metrics_of_a_request(server: Server, cells: ad.AnnData) -> None:
    """A request shows in cells, stages, batch rows and requests by route template, all with the right amounts."""
    before = samples(server)
    body = arrow_body(cells.X, tuple(cells.var_names))
    assert httpx.post(server.url + "/v1/embed", content=body, headers=ARROW).status_code == 200
    after = samples(server)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert grown("cellserve_cells_total", model="pbmc", version=VERSION, task="embed") == cells.n_obs
    assert grown("cellserve_batch_rows_sum", task="embed") == cells.n_obs
    assert grown("cellserve_requests_total", route="/v1/embed", method="POST", status="200") == 1
    for stage in ("read", "parse_wait", "parse", "align", "queue", "compute", "serialise"):
        assert grown("cellserve_stage_seconds_count", task="embed", stage=stage) == 1
    assert (
        after[
            (
                "cellserve_model_info",
                tuple(sorted({"model": "pbmc", "version": VERSION, "family": "vae", "provider": "cpu"}.items())),
            )
        ]
        == 1
    )
    assert after[("cellserve_queue_rows", ())] == 0


def test_series_exist_from_the_start(server: Server) -> None:
    """Tasks and error codes have their series before anything happened, so that a rate can be taken of the first event."""
    found = samples(server)

    assert ("cellserve_refused_total", (("code", "queue_full"),)) in found
    for task in TASKS:
        assert ("cellserve_stage_seconds_count", (("stage", "compute"), ("task", task))) in found


def test_random_paths_make_one_series(server: Server) -> None:
    """However many paths a scanner tries, they are one series; each is answered by a problem."""
    with httpx.Client(base_url=server.url) as client:
        for number in range(500):
            answer = client.get(f"/wp-admin/{number}")
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    routes = {dict(labels)["route"] for name, labels in samples(server) if name == "cellserve_requests_total"}

    assert "unmatched" in routes
    assert not any("wp-admin" in route for route in routes)


async def test_logs_are_json_and_hold_no_cell_or_gene(server: Server, cells: ad.AnnData) -> None:
    """Each request is one line of JSON with the id that the client sent; nothing of its cells is written, refused or not."""
    secret = tuple(f"PATIENT-{number}" for number in range(cells.n_obs))
    body = arrow_body(cells.X, tuple(cells.var_names), cell_ids=secret)
    httpx.post(server.url + "/v1/embed", content=body, headers={**ARROW, "X-Request-ID": "my-own-id"})
    httpx.post(
        server.url + "/v1/embed",
        content=arrow_body(cells.X * 0.5, tuple(cells.var_names), cell_ids=secret),
        headers=ARROW,
    )
    has_begun = threading.Event()

    def good_then_bad() -> Iterator[sp.csr_matrix]:
        yield cells.X
        assert has_begun.wait(10)
        yield cells.X * 0.5

    with Client(server.url) as client:
        answers = client.stream("embed", good_then_bad(), list(cells.var_names), on_progress=lambda *_: has_begun.set())
        with pytest.raises(CellserveProblem):
            list(answers)
    await until(lambda: "Exception in ASGI application" in server.log())
    log = server.log()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]

    assert any(line.get("request_id") == "my-own-id" and line["route"] == "/v1/embed" for line in lines)
    assert "PATIENT" not in log
    found = set(re.findall(r"[A-Z0-9-]{4,}", log)) & set(cells.var_names)
    assert not found, [line for line in log.splitlines() if any(one in line for one in found)][:3]
    assert "PATIENT" not in httpx.get(server.url + "/metrics").text


def test_request_ids(server: Server) -> None:
    """A usable id comes back; one with a line break's worth of trouble or of 10 kB is replaced."""
    assert httpx.get(server.url + "/livez", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    for unusable in ("a b", "x" * 10_000, 'say "hi"'):
        given = httpx.get(server.url + "/livez", headers={"X-Request-ID": unusable}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", given)


def test_distinct_ids_on_one_connection(server: Server, cells: ad.AnnData) -> None:
    """Bodies over 64 KiB on one keep-alive connection each get an id of their own, which plain BentoML gets wrong."""
    body = arrow_body(cells.X[[0] * 200], tuple(cells.var_names))
    assert len(body) > 2**16
    with httpx.Client(base_url=server.url) as client:
        ids = {client.post("/v1/embed", content=body, headers=ARROW).headers["x-request-id"] for _ in range(10)}

    assert len(ids) == 10
