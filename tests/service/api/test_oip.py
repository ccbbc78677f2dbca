"""The Open Inference Protocol's endpoints over the tiny model: statuses, the form of errors, limits, and what is counted."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import metrics
from service.api.oip_signature import outputs_of, tasks_for
from service.errors import QueueFull
from service.inference import TASKS
from tests.builders import CLASSES, N_GENES, N_LATENT, counts, json_body, write_artifact
from tests.conftest import serving
from tests.service.cells.formats.test_tensors import body

HEADER_LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/tiny/infer"


def request(n_cells: int = 3, outputs: tuple[str, ...] = (), **header: Any) -> bytes:
    """A request of JSON."""
    values = counts(n_cells).toarray()
    asked = {"outputs": [{"name": name} for name in outputs]} if outputs else {}
    return body(("counts", "FP32", values), is_binary=False, **asked, **header)[0]


async def error_of(answer: httpx.Response) -> str:
    """The sentence of an error, whose form is the protocol's and nothing else."""
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert set(document) == {"error"}
    return document["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v2/models/nope", 404, "no model 'nope'"),
        ("GET", "/v2/models/nope/config", 404, "no model 'nope'"),
        ("GET", "/v2/models/nope/stats", 404, "no model 'nope'"),
        ("GET", "/v2/models/nope/ready", 404, "no model 'nope'"),
        ("POST", "/v2/models/nope/infer", 404, "no model 'nope'"),
        ("GET", "/v2/models/tiny/versions/7", 404, "no model 'tiny@7'"),
        ("POST", "/v2/models/tiny/versions/7/infer", 404, "no model 'tiny@7'"),
        ("GET", "/v2/models/tiny@1", 404, "no model"),
        ("GET", "/v2/models/tiny/trace/setting", 404, "nothing at this path"),
        ("GET", "/v2/systemsharedmemory/status", 404, "nothing at this path"),
        ("POST", "/v2/repository/models/tiny/load", 404, "nothing at this path"),
        ("GET", INFER, 405, "GET is not allowed"),
        ("POST", "/v2", 405, "POST is not allowed"),
        ("POST", INFER, 400, "empty"),
    ],
)
async def test_errors(client: httpx.AsyncClient, method: str, path: str, status: int, words: str) -> None:
    """Whatever goes wrong below /v2 is the protocol's error, with its status."""
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert words in await error_of(answer)


async def test_elsewhere_errors_are_problems(client: httpx.AsyncClient) -> None:
    """Paths that only begin alike are none of the protocol's."""
    for path in ("/v2x", "/v1/models/nope", "/nope"):
        assert (await client.get(path)).headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"{", {}, 400, "cannot be read"),
        (b"[]", {}, 400, "the request"),
        (b'{"inputs": []}', {}, 400, "inputs"),
        (request(outputs=("OUTPUT0",)), {}, 400, "unexpected inference output 'OUTPUT0' for model 'tiny'"),
        (request(outputs=("latent", "latent")), {}, 400, "asked for twice"),
        (request(parameters={"binary_data_output": 1}), {}, 400, "must be true or false"),
        (request(parameters={"timeout": "soon"}), {}, 400, "microseconds"),
        (request(parameters={"sequence_id": 3}), {}, 400, "means nothing for these outputs"),
        (request(outputs=("latent",), parameters={"library_size": 3}), {}, 400, "means nothing for these outputs"),
        (request(parameters={"library_size": -3}), {}, 400, "greater than 0"),
        (request(parameters={"batch": "three"}), {}, 400, "'three' is not one of"),
        (request(id=7), {}, 400, "id: "),
        (request(), {HEADER_LENGTH: "12x"}, 400, "must be a number of bytes"),
        (request(), {HEADER_LENGTH: "12"}, 400, "cannot be read"),
        (request(), {HEADER_LENGTH: "9" * 18}, 400, "Inference-Header-Content-Length is"),
        (request(), {"Content-Encoding": "br"}, 415, "gzip, deflate"),
        (request(), {"Content-Encoding": "gzip"}, 400, "is not gzip"),
        (request(), {"X-Request-Timeout": "soon"}, 400, "X-Request-Timeout"),
        (request(5_001), {}, 413, "5,001 cells"),
        (body(("counts", "FP32", counts(2).toarray() + 0.5), is_binary=False)[0], {}, 400, "fractional"),
        (
            body(("counts", "FP32", np.ones((1, 2))), ("genes", "BYTES", ["X", "Y"]), is_binary=False)[0],
            {},
            400,
            "Of the 40 genes",
        ),
        (
            request().replace(
                b'"inputs"', b'"outputs": [{"name": "probabilities", "parameters": {"classification": 2}}], "inputs"'
            ),
            {},
            400,
            "classification",
        ),
        (
            request().replace(
                b'"inputs"', b'"outputs": [{"name": "latent", "parameters": {"binary_data": 1}}], "inputs"'
            ),
            {},
            400,
            "must be true or false",
        ),
    ],
)
async def test_requests_that_are_refused(
    client: httpx.AsyncClient, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    """Each with the protocol's status and a sentence that says what is wrong; it counts as failed, and nothing runs."""
    before = (await client.get("/v2/models/tiny/stats")).json()["model_stats"][0]
    answer = await client.post(INFER, content=content, headers=headers)
    after = (await client.get("/v2/models/tiny/stats")).json()["model_stats"][0]

    assert (answer.status_code, words in await error_of(answer)) == (status, True), answer.text
    assert after["execution_count"] == before["execution_count"]
    assert after["inference_stats"]["success"] == before["inference_stats"]["success"]
    # What is wrong with the headers is found before there is a request to a model.
    n_failed = after["inference_stats"]["fail"]["count"] - before["inference_stats"]["fail"]["count"]
    assert n_failed == (0 if headers in ({HEADER_LENGTH: "12x"}, {"X-Request-Timeout": "soon"}) else 1)


async def test_answers_of_other_routes(client: httpx.AsyncClient) -> None:
    """All outputs, in JSON: the numbers are those of the tasks' own routes."""
    answer = (await client.post(INFER, content=request(id="a-7"))).json()
    found = {output["name"]: output for output in answer["outputs"]}
    sent = json_body(counts(3), tuple(f"G{number}" if number != 3 else "RP11-885N19.6" for number in range(N_GENES)))
    embed, annotate, reconstruct = [
        (await client.post(f"/v1/{task}", content=sent, headers={"Content-Type": "application/json"})).json()["cells"]
        for task in ("embed", "annotate", "reconstruct")
    ]

    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "1", "a-7")
    assert answer["parameters"] == {
        "gene_overlap": 1.0,
        "n_missing": 0,
        "missing_weight": 0.0,
        "n_unknown": 0,
        "n_empty": 0,
    }
    assert found["latent"]["shape"] == [3, N_LATENT]
    assert found["latent"]["data"] == [value for cell in embed for value in cell["latent"]]
    assert found["predicted_labels"]["data"] == [cell["predicted_labels"] for cell in annotate]
    assert found["probabilities"]["data"] == [cell["probabilities"][name] for cell in annotate for name in CLASSES]
    assert found["expression"]["data"] == [value for cell in reconstruct for value in cell["expression"].values()]
    assert found["is_empty"]["data"] == [False] * 3


async def test_metadata_is_what_is_answered(client: httpx.AsyncClient) -> None:
    """Every output has the name, type and shape that the metadata and the configuration say, in their order."""
    metadata, config = [(await client.get(f"/v2/models/tiny{path}")).json() for path in ("", "/config")]
    outputs = (await client.post(INFER, content=request(4))).json()["outputs"]

    assert [(output["name"], output["datatype"]) for output in outputs] == [
        (output["name"], output["datatype"]) for output in metadata["outputs"]
    ]
    for output, said, configured in zip(outputs, metadata["outputs"], config["output"], strict=True):
        assert output["shape"] == [4, *said["shape"][1:]]
        assert (configured["name"], configured["dims"]) == (said["name"], said["shape"])
        assert configured["data_type"] == "TYPE_" + {"BYTES": "STRING"}.get(said["datatype"], said["datatype"])
    assert [said["name"] for said in config["input"]] == [said["name"] for said in metadata["inputs"]]


async def test_parameters_are_the_options_of_tasks(client: httpx.AsyncClient) -> None:
    """The options of a task are parameters of the request."""
    asked = {"genes": "G5,G1", "library_size": 100, "batch": "two"}
    (output,) = (await client.post(INFER, content=request(2, ("expression",), parameters=asked))).json()["outputs"]
    sent = json_body(counts(2), tuple(f"ENSG{number:011d}" for number in range(N_GENES)))
    headers = {"Content-Type": "application/json"}
    cells = (await client.post("/v1/reconstruct", content=sent, headers=headers, params=asked)).json()["cells"]

    assert output["shape"] == [2, 2]
    assert output["data"] == [value for cell in cells for value in cell["expression"].values()]


async def test_fewest_tasks(client: httpx.AsyncClient) -> None:
    """Only what is asked for is computed, and what several tasks give is not computed twice."""
    outputs = await outputs_of(client.state, client.state.models.get("tiny"))

    def named(*names: str) -> list[str]:
        return [task.name for task in tasks_for(outputs, names)]

    assert named("is_empty") == ["embed"]
    assert named("is_empty", "conf_score") == ["annotate"]
    assert named("conf_score", "latent") == ["embed", "annotate"]
    assert named(*outputs) == [task.name for task in TASKS.values() if not task.is_composite]


async def test_versions(tmp_path: Path) -> None:
    """A version and an alias are named in the path; without one it is the default."""
    write_artifact(tmp_path, version="1")
    write_artifact(tmp_path, version="2", seed=5)
    (tmp_path / "tiny/aliases.json").write_text('{"default": "1", "canary": "2"}')
    async with serving(tmp_path) as client:
        paths = ("/v2/models/tiny", "/v2/models/tiny/versions/2", "/v2/models/tiny/versions/canary")
        answers = [(await client.post(f"{path}/infer", content=request(outputs=("latent",)))).json() for path in paths]
        assert [answer["model_version"] for answer in answers] == ["1", "2", "2"]
        assert answers[0]["outputs"] != answers[1]["outputs"] == answers[2]["outputs"]
        assert (await client.get(paths[1])).json()["versions"] == ["1", "2"]
        entries = (await client.get("/v2/models/tiny/stats")).json()["model_stats"]
        assert [(entry["version"], entry["inference_count"]) for entry in entries] == [("1", 3), ("2", 6)]
        (entry,) = (await client.get("/v2/models/tiny/versions/canary/stats")).json()["model_stats"]
        assert entry["version"] == "2"


async def test_a_version_that_cannot_be_served(tmp_path: Path) -> None:
    """It is in the index with its reason, it is not ready, and the others are."""
    for version in ("1", "2"):
        write_artifact(tmp_path, version=version)
    (tmp_path / "tiny/aliases.json").write_text('{"default": "1"}')
    (tmp_path / "tiny/2/decode.onnx").write_bytes(b"")
    async with serving(tmp_path) as client:
        one, two = (await client.post("/v2/repository/index")).json()
        assert (one["version"], one["state"], one["reason"]) == ("1", "READY", "")
        assert (two["version"], two["state"]) == ("2", "UNAVAILABLE")
        assert "decode.onnx" in two["reason"]
        assert (await client.post("/v2/repository/index", content=b'{"ready": true}')).json() == [one]
        answers = [await client.get(f"/v2/models/tiny/versions/{version}/ready") for version in "12"]
        assert [answer.status_code for answer in answers] == [200, 400]
        assert "decode.onnx" in await error_of(answers[1])
        answer = await client.post("/v2/models/tiny/versions/2/infer", content=request())
        assert (answer.status_code, "decode.onnx" in await error_of(answer)) == (503, True)
        for content in (b"[]", b"{", b'{"ready": 1}'):
            answer = await client.post("/v2/repository/index", content=content)
            assert answer.status_code == 400
            assert await error_of(answer)


async def test_not_ready(tmp_path: Path) -> None:
    """While models load and while the server drains it lives, but is not ready."""
    write_artifact(tmp_path)
    async with serving(tmp_path, is_loaded=False) as client:
        assert (await client.get("/v2/health/live")).status_code == 200
        answer = await client.get("/v2/health/ready")
        assert (answer.status_code, "being loaded" in await error_of(answer)) == (400, True)
        client.state.models.load_all()
        assert (await client.get("/v2/health/ready")).status_code == 200
        client.state.is_draining = True
        assert (await client.get("/v2/health/ready")).status_code == 400
        answer = await client.post(INFER, content=request())
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        assert "shutting down" in await error_of(answer)


async def test_too_much_at_a_time(tiny_path: Path) -> None:
    """A full queue and a full intake are 429 with Retry-After, as everywhere, and leave nothing behind."""
    async with serving(tiny_path, max_queue_rows=100) as client:
        answer = await client.post(INFER, content=request(101))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "do not fit under 100" in await error_of(answer)
    content = request(100)
    async with serving(tiny_path, max_bytes_in_flight=len(content) + 1000) as client:
        held = metrics.BODY_BYTES_IN_FLIGHT._value.get()
        # The body fits, the body and its answer do not.
        answer = await client.post(INFER, content=content)
        assert (answer.status_code, "no room" in await error_of(answer)) == (429, True)
        assert metrics.BODY_BYTES_IN_FLIGHT._value.get() == held


async def test_answers_that_would_be_too_large(tiny_path: Path) -> None:
    """An answer is made whole, so its size is bounded before anything runs; the sentence says how many cells do fit."""
    sent = [
        ("data", "FP32", np.empty(0, np.float32)),
        ("indices", "INT64", np.empty(0, np.int64)),
        ("indptr", "INT64", np.zeros(4_001, np.int64)),
    ]
    asked = {"outputs": [{"name": "expression", "parameters": {"binary_data": True}}]}
    content, length = body(*sent, **asked)
    async with serving(tiny_path, max_decoded_bytes=600_000) as client:
        answer = await client.post(INFER, content=content, headers={HEADER_LENGTH: str(length)})
        assert (answer.status_code, "takes 3,750 at a time" in await error_of(answer)) == (413, True)
        entry = (await client.get("/v2/models/tiny/stats")).json()["model_stats"][0]
        assert entry["execution_count"] == 0


async def test_deadlines(client: httpx.AsyncClient) -> None:
    """`timeout` in microseconds and X-Request-Timeout in seconds: what cannot be done by then is not begun."""
    assert (await client.post(INFER, content=request(500))).status_code == 200  # its speed is known from here on
    for headers, parameters in (({"X-Request-Timeout": "0.000001"}, {}), ({}, {"timeout": 1})):
        answer = await client.post(INFER, content=request(500, parameters=parameters), headers=headers)
        assert answer.status_code in (429, 504)
        assert "deadline" in await error_of(answer)
    assert (await client.post(INFER, content=request(parameters={"timeout": 10**7}))).status_code == 200


async def test_statistics(client: httpx.AsyncClient) -> None:
    """Requests, cells, runs and times add up."""
    started = time.time() * 1000
    before = (await client.get("/v2/models/stats")).json()["model_stats"][0]
    for n_cells in (1, 300, 2):
        assert (await client.post(INFER, content=request(n_cells, ("latent",)))).status_code == 200
    await client.post(
        "/v1/embed",
        content=json_body(counts(5), tuple(f"ENSG{number:011d}" for number in range(N_GENES))),
        headers={"Content-Type": "application/json"},
    )
    after = (await client.get("/v2/models/tiny/stats")).json()["model_stats"][0]
    stages = after["inference_stats"]

    assert after["inference_count"] - before["inference_count"] == 303
    # 300 cells are two runs of at most 256; the five of the other route are a run of the same model.
    assert after["execution_count"] - before["execution_count"] == 5
    assert {entry["batch_size"]: entry["compute_infer"]["count"] for entry in after["batch_stats"]} == {
        1: 1,
        2: 1,
        5: 1,
        44: 1,
        256: 1,
    }
    assert started <= after["last_inference"] <= time.time() * 1000
    for stage in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert stages[stage]["count"] - before["inference_stats"][stage]["count"] == 3
        assert stages[stage]["ns"] > 0
    assert stages["fail"]["count"] == 0
    assert stages["success"]["ns"] > stages["compute_infer"]["ns"]


async def test_requests_run_together(client: httpx.AsyncClient) -> None:
    """Cells of this protocol and of the tasks' routes share runs: both are in one queue."""
    sent = json_body(counts(1), tuple(f"ENSG{number:011d}" for number in range(N_GENES)))
    asked = [
        client.post(INFER, content=request(1, ("latent",)))
        if number % 2
        else client.post("/v1/embed", content=sent, headers={"Content-Type": "application/json"})
        for number in range(60)
    ]
    answers = await asyncio.gather(*asked)
    entry = (await client.get("/v2/models/tiny/stats")).json()["model_stats"][0]

    assert {answer.status_code for answer in answers} == {200}
    assert entry["inference_count"] == 30
    assert sum(run["batch_size"] * run["compute_infer"]["count"] for run in entry["batch_stats"]) == 60
    assert entry["execution_count"] < 60


async def test_an_unexpected_error(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is 500 in the protocol's form, without a trace, and counts as failed."""

    def broken(*_: object) -> None:
        raise KeyError("internal-name")

    monkeypatch.setattr("service.api.oip_infer.prepare", broken)
    answer = await client.post(INFER, content=request())
    entry = (await client.get("/v2/models/tiny/stats")).json()["model_stats"][0]

    assert answer.status_code == 500
    assert "internal-name" not in await error_of(answer)
    assert "internal-name" in caplog.text
    assert entry["inference_stats"]["fail"]["count"] == 1


async def test_refusals_are_counted_by_code(client: httpx.AsyncClient) -> None:
    """The metric of refusals does not ask which form an error had."""
    before = metrics.REFUSED.labels(QueueFull.code)._value.get(), metrics.REFUSED.labels("malformed_body")._value.get()
    await client.post(INFER, content=b"{")
    after = metrics.REFUSED.labels(QueueFull.code)._value.get(), metrics.REFUSED.labels("malformed_body")._value.get()
    assert after == (before[0], before[1] + 1)
