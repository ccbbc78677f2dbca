"""POST /v1/<task> within one process: what is refused before the body, options, formats, time and memory."""

import asyncio
import json
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from service.api import tasks
from service.errors import CellserveError
from service.inference import TASKS, annotate, batcher
from tests.builders import arrow_body, counts, gene_table, json_body, write_artifact
from tests.conftest import serving

GENES = gene_table().gene_symbol
JSON = {"Content-Type": "application/json"}
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
BODY = json_body(counts(3), GENES)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize("task", TASKS)
async def test_every_task_answers(client: httpx.AsyncClient, task: str) -> None:
    """One entry per cell in order, a head, and the timing headers."""
    answer = await client.post(f"/v1/{task}", content=json_body(counts(3), GENES, ("a", "b", "c")), headers=JSON)
    document = answer.json()

    assert answer.status_code == 200
    assert [cell["cell_id"] for cell in document["cells"]] == ["a", "b", "c"]
    assert document["model"] == {"name": "tiny", "version": "1"}
    assert document["genes"]["gene_overlap"] == 1
    assert document["counts"] == {"n_cells": 3, "n_empty": 0, "warnings": []}
    assert answer.headers["x-cellserve-model"] == "tiny@1"
    assert [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")] == [
        "read",
        "parse_wait",
        "parse",
        "align",
        "queue",
        "compute",
    ]


@pytest.mark.parametrize("task", TASKS)
async def test_pieces_join(tiny_path: Path, task: str) -> None:
    """An answer that streams in many pieces is the answer in one piece, in both formats."""
    body = arrow_body(counts(100), GENES, tuple(f"c{number}" for number in range(100)))
    async with serving(tiny_path) as whole, serving(tiny_path, batch_rows=7) as pieces:
        for accept in (*JSON.values(), *ARROW.values()):
            headers = {**ARROW, "Accept": accept, "X-Request-ID": "same"}
            one = await whole.post(f"/v1/{task}", content=body, headers=headers)
            many = await pieces.post(f"/v1/{task}", content=body, headers=headers)
            if accept in JSON.values():
                assert one.json() == many.json()
            else:
                tables = [pa.ipc.open_stream(answer.content).read_all() for answer in (one, many)]
                assert tables[0].to_pylist() == tables[1].to_pylist()
                assert tables[1].column(0).num_chunks == 15


@pytest.mark.parametrize(
    ("path", "headers", "body", "expected"),
    [
        ("/v1/embed", {}, BODY, (415, "unsupported_media_type")),
        ("/v1/embed", {"Content-Type": "text/csv"}, BODY, (415, "unsupported_media_type")),
        ("/v1/embed", {**JSON, "Content-Encoding": "gzip"}, BODY, (415, "unsupported_media_type")),
        ("/v1/embed", {**JSON, "Accept": "text/html"}, BODY, (406, "not_acceptable")),
        ("/v1/embed", JSON, b"", (400, "empty_body")),
        ("/v1/embed", JSON, b"[", (400, "malformed_body")),
        ("/v1/embed", JSON, b"{}", (422, "invalid_cells")),
        ("/v1/embed", JSON, b'{"genes": ["G1"], "cells": []}', (422, "no_cells")),
        ("/v1/embed", JSON, b'{"genes": ["x"], "cells": [[1]]}', (422, "too_few_genes")),
        ("/v1/embed", JSON, json_body(counts(2) * 0.5, GENES), (422, "not_raw_counts")),
        ("/v1/embed?model=nope", JSON, BODY, (404, "model_not_found")),
        ("/v1/embed?model=..%2f..%2fetc", JSON, BODY, (404, "model_not_found")),
        ("/v1/embed?model=tiny%00", JSON, BODY, (404, "model_not_found")),
        ("/v1/embed?surprise=1", JSON, BODY, (400, "invalid_option")),
        ("/v1/embed?model=tiny&model=tiny", JSON, BODY, (400, "invalid_option")),
        ("/v1/reconstruct?library_size=-1", JSON, BODY, (400, "invalid_option")),
        ("/v1/reconstruct?library_size=nan", JSON, BODY, (400, "invalid_option")),
        ("/v1/reconstruct?genes=NOPE", JSON, BODY, (400, "invalid_option")),
        ("/v1/reconstruct?batch=three", JSON, BODY, (400, "invalid_option")),
        ("/v1/nothing", JSON, BODY, (404, "not_found")),
        ("/v1/embed/", JSON, BODY, (404, "not_found")),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], body: bytes, expected: tuple[int, str]
) -> None:
    """Each wrong thing has its status and its code, as a problem document."""
    assert code_of(await client.post(path, content=body, headers=headers)) == expected


async def test_wrong_method(client: httpx.AsyncClient) -> None:
    """405 says what is allowed."""
    answer = await client.get("/v1/embed")

    assert code_of(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


async def test_a_task_that_the_model_lacks(tmp_path: Path) -> None:
    """Without its graph a task is not offered; what is offered is said, and works."""
    from service.contract import artifact
    from tests.builders import parts

    document, contents = parts(has_reference=False, is_explained=False)
    for part in (document["graphs"], document["golden"]["tolerance"]):
        for key in [key for key in part if key.startswith("classify")]:
            del part[key]
    del contents["classify.onnx"]
    document.update(labels=[], files={name: file.model_dump() for name, file in artifact.describe(contents).items()})
    artifact.write(tmp_path, artifact.Manifest.model_validate(document), contents)
    async with serving(tmp_path) as client:
        refused = await client.post("/v1/annotate", content=BODY, headers=JSON)
        assert code_of(refused) == (404, "task_not_offered")
        assert refused.json()["offered"] == "embed, reconstruct"
        assert (await client.post("/v1/embed", content=BODY, headers=JSON)).status_code == 200


async def test_several_models(tmp_path: Path) -> None:
    """Without ?model= there must be one model; with it name, version and alias are understood."""
    write_artifact(tmp_path, name="one")
    write_artifact(tmp_path, name="two", seed=1)
    async with serving(tmp_path) as client:
        assert code_of(await client.post("/v1/embed", content=BODY, headers=JSON)) == (404, "model_not_found")
        answers = [
            await client.post(f"/v1/embed?model={name}", content=BODY, headers=JSON) for name in ("one", "two@1")
        ]
    assert [answer.headers["x-cellserve-model"] for answer in answers] == ["one@1", "two@1"]
    assert answers[0].json()["cells"] != answers[1].json()["cells"]


async def test_while_loading(tiny_path: Path) -> None:
    """Before models are loaded the server lives, is not ready, and says why to a task."""
    async with serving(tiny_path, is_loaded=False) as client:
        assert (await client.get("/livez")).status_code == 200
        assert code_of(await client.get("/readyz")) == (503, "not_ready")
        assert code_of(await client.post("/v1/embed", content=BODY, headers=JSON)) == (503, "model_not_ready")
        client.state.models.load_all()
        assert (await client.get("/readyz")).status_code == 200


async def test_while_draining(client: httpx.AsyncClient) -> None:
    """A server that shuts down is not ready and takes no new work; the connection is closed."""
    client.state.is_draining = True
    answer = await client.post("/v1/embed", content=BODY, headers=JSON)

    assert code_of(answer) == (503, "shutting_down")
    assert answer.headers["connection"] == "close"
    assert (await client.get("/readyz")).status_code == 503


class TestLimits:
    """Memory and time are bounded by settings."""

    async def test_declared_body(self, tiny_path: Path) -> None:
        """A body that is declared too large is refused before a byte of it is read."""
        read = []

        async def body():
            read.append(1)
            yield b"x" * 10

        async with serving(tiny_path, max_body_bytes=1000) as client:
            answer = await client.post("/v1/embed", content=body(), headers={**JSON, "Content-Length": "1001"})
        assert code_of(answer) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"
        assert not read

    async def test_undeclared_body(self, tiny_path: Path) -> None:
        """A body without a length is refused at the limit, not after its end."""
        sent = 0

        async def body():
            nonlocal sent
            for _ in range(1000):
                sent += 100
                yield b"x" * 100

        async with serving(tiny_path, max_body_bytes=1000) as client:
            answer = await client.post("/v1/embed", content=body(), headers=JSON)
            assert client.state.intake._n_bytes == 0
        assert code_of(answer) == (413, "body_too_large")
        assert sent <= 1200

    async def test_all_bodies(self, tiny_path: Path) -> None:
        """Bodies that together exceed the bound get 429 with Retry-After; room comes back."""
        gate = asyncio.Event()

        async def slow():
            yield BODY[:10]
            await gate.wait()
            yield BODY[10:]

        async with serving(tiny_path, max_body_bytes=len(BODY), max_bytes_in_flight=len(BODY) + 5) as client:
            declared = {**JSON, "Content-Length": str(len(BODY))}
            first = asyncio.create_task(client.post("/v1/embed", content=slow(), headers=declared))
            while not client.state.intake._n_bytes:
                await asyncio.sleep(0.001)
            refused = await client.post("/v1/embed", content=BODY, headers=JSON)
            gate.set()
            assert code_of(refused) == (429, "too_many_bytes")
            assert refused.headers["retry-after"] == "1"
            assert (await first).status_code == 200
            assert (await client.post("/v1/embed", content=BODY, headers=JSON)).status_code == 200

    async def test_a_body_that_does_not_come(self, tiny_path: Path) -> None:
        """A body that stalls is given up with what had arrived, and its room is free again."""

        async def stalling():
            yield BODY[:10]
            await asyncio.sleep(30)

        async with serving(tiny_path, body_timeout=0.05) as client:
            answer = await client.post("/v1/embed", content=stalling(), headers=JSON)
            assert code_of(answer) == (408, "body_timeout")
            assert answer.json()["n_bytes"] == 10
            assert client.state.intake._n_bytes == 0

    async def test_too_many_cells(self, tiny_path: Path) -> None:
        """A request of more cells than allowed is refused with both numbers."""
        async with serving(tiny_path, max_cells=2) as client:
            answer = await client.post("/v1/embed", content=BODY, headers=JSON)
        assert code_of(answer) == (413, "too_many_cells")
        assert (answer.json()["n_cells"], answer.json()["limit_cells"]) == (3, 2)

    async def test_a_full_queue(self, tiny_path: Path) -> None:
        """What does not fit into the queue gets 429 with Retry-After."""
        async with serving(tiny_path, max_queue_rows=2) as client:
            answer = await client.post("/v1/embed", content=BODY, headers=JSON)
        assert code_of(answer) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1

    async def test_an_answer_that_does_not_come(self, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer that takes too long is given up, and its cells leave the queue."""
        import threading

        gate = threading.Event()
        original = batcher._compute
        monkeypatch.setattr(batcher, "_compute", lambda pieces: (gate.wait(5), original(pieces))[1])
        async with serving(tiny_path, timeout_seconds=0.05) as client:
            answers = await asyncio.gather(*(client.post("/v1/embed", content=BODY, headers=JSON) for _ in range(3)))
            assert {code_of(answer) for answer in answers} == {(504, "timeout")}
            assert client.state.batcher._n_queued == 0
            gate.set()

    async def test_a_deadline(self, client: httpx.AsyncClient) -> None:
        """X-Request-Timeout bounds the wait; one that is no number of seconds is refused."""
        for given in ("5", "0.5", "30.25"):
            headers = {**JSON, "X-Request-Timeout": given}
            assert (await client.post("/v1/embed", content=BODY, headers=headers)).status_code == 200
        for wrong in ("soon", "-1", "1e3", "inf", "", "nan"):
            answer = await client.post("/v1/embed", content=BODY, headers={**JSON, "X-Request-Timeout": wrong})
            assert code_of(answer) == (400, "invalid_option")
            assert "X-Request-Timeout" in answer.json()["detail"]
        client.state.batcher._rows_per_second = 0.1
        client.state.batcher._running_since = time.monotonic()  # an idle server refuses nothing by its estimate
        answer = await client.post("/v1/embed", content=BODY, headers={**JSON, "X-Request-Timeout": "1"})
        assert code_of(answer) == (429, "deadline_too_short")
        assert int(answer.headers["retry-after"]) >= 1


async def test_an_unexpected_error(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is a 500 problem without a trace of the inside; the trace is in the log, with the request id."""

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(annotate, "_answers", broken)
    answer = await client.post("/v1/annotate", content=BODY, headers=JSON)

    assert code_of(answer) == (500, CellserveError.code)
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/vnd.apache.arrow.stream", ARROW),
        ("application/json;q=0.5, application/vnd.apache.arrow.stream", ARROW),
        ("text/html, application/vnd.apache.arrow.stream;q=0.1", ARROW),
        ("*/*, application/json;q=0", ARROW),
    ],
)
async def test_accept(client: httpx.AsyncClient, accept: str | None, media_type: dict[str, str]) -> None:
    """Accept decides, by weight and by how specific it is; without it the answer has the body's format."""
    headers = {**JSON, **({"Accept": accept} if accept else {})}
    request = client.build_request("POST", "/v1/embed", content=BODY, headers=headers)
    if accept is None:
        del request.headers["accept"]

    assert (await client.send(request)).headers["content-type"] == media_type["Content-Type"]


async def test_duplicates_and_renames_are_reported(client: httpx.AsyncClient) -> None:
    """The head of an answer says what became of genes."""
    genes = ("OLD0", "ENSG00000000001.2", "G1", *GENES[2:], "other")
    body = json.dumps({"genes": genes, "cells": [[1] * len(genes)]})
    report = (await client.post("/v1/embed", content=body, headers=JSON)).json()["genes"]

    assert report["renamed"] == {"OLD0": "G0", "ENSG00000000001.2": "G1"}
    assert report["duplicated"] == {"G1": 2}
    assert report["n_unknown"] == 1
    assert np.isclose(report["missing_weight"], 0)


@pytest.mark.parametrize(("compression", "is_here"), [(None, True), ("zstd", False)])
async def test_where_a_body_is_parsed(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None, is_here: bool
) -> None:
    """In the event loop as far as the service allows it, and never what may be many times larger than it was sent."""
    read, threads = tasks._read, []

    def noting(*arguments):
        threads.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr(tasks, "_read", noting)
    monkeypatch.setattr(tasks, "PARSED_AT_ONCE", 0)
    body = arrow_body(sp.vstack([counts(20)] * 100, format="csr"), GENES, compression=compression)
    async with serving(tiny_path, here=batcher.Here(arrow_bytes=2**20)) as client:
        assert (await client.post("/v1/embed", content=body, headers=ARROW)).status_code == 200
    assert (threads == [threading.main_thread()]) == is_here
