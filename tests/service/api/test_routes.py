"""Catalogue, health, metrics, and the OpenAPI document against what really answers."""

import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from service.api import openapi, problems
from service.api.routes import build_api
from service.contract import artifact
from service.contract.manifest import Manifest
from service.errors import CellserveError
from service.inference import TASKS
from service.inference.questions import QUESTIONS
from tests.builders import N_REFERENCE, gene_table, parts, write_artifact
from tests.conftest import serving
from tests.end_to_end.server import running_server


async def test_models(tmp_path: Path) -> None:
    """Every version is listed with its state; the good ones with what they offer."""
    for version in ("1", "2"):
        write_artifact(tmp_path, version=version)
    (tmp_path / "tiny/2/decode.onnx").write_bytes(b"")
    (tmp_path / "tiny/aliases.json").write_text('{"default": "1"}')
    async with serving(tmp_path) as client:
        one, two = (await client.get("/v1/models")).json()["models"]

    assert (one["name"], one["version"], one["aliases"], one["state"]) == ("tiny", "1", ["default"], "ready")
    assert one["tasks"] == list(TASKS)
    assert one["labels"] == {"cell_type": ["B", "T", "NK"]}
    assert "decode.onnx" in two["state"]
    assert "tasks" not in two


@pytest.mark.parametrize("path", ["/v1/models/tiny", "/v1/models/tiny/versions/1", "/v1/models/tiny/versions/default"])
async def test_a_model(tmp_path: Path, path: str) -> None:
    """Manifest and card of a model, a version, an alias."""
    write_artifact(tmp_path)
    (tmp_path / "tiny/aliases.json").write_text('{"default": "1"}')
    async with serving(tmp_path) as client:
        document = (await client.get(path)).json()
        genes = await client.get(f"{path}/genes")

    assert document["manifest"]["genes"]["digest"] == gene_table().digest
    assert document["card"].startswith("# tiny")
    assert genes.content == gene_table().dump()
    assert genes.headers["content-type"].startswith("text/tab-separated-values")


async def test_a_card(tmp_path: Path) -> None:
    """The artifact's page, of which a browser runs and loads nothing; Markdown where there is no page."""
    write_artifact(tmp_path)
    document, contents = parts(version="2")
    contents["card.html"] = b"<!DOCTYPE html><title>tiny@2</title>"
    document["files"] = {file: entry.model_dump() for file, entry in artifact.describe(contents).items()}
    artifact.write(tmp_path, Manifest.model_validate(document), contents)
    async with serving(tmp_path) as client:
        text = await client.get("/v1/models/tiny/versions/1/card")
        page = await client.get("/v1/models/tiny/card")

    assert text.text.startswith("# tiny")
    assert text.headers["content-type"].startswith("text/markdown")
    assert page.content == contents["card.html"]
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "sandbox" in page.headers["content-security-policy"]


async def test_reference(tmp_path: Path) -> None:
    """The cells that a model carries, in one order in every format, with batch, labels and coordinates."""
    write_artifact(tmp_path)
    write_artifact(tmp_path, version="2", has_reference=False)
    async with serving(tmp_path) as client:
        answer = await client.get("/v1/models/tiny/versions/1/reference")
        arrow = await client.get(
            "/v1/models/tiny/versions/1/reference", headers={"Accept": "application/vnd.apache.arrow.stream"}
        )
        absent = await client.get("/v1/models/tiny/versions/2/reference")
        other = await client.get("/v1/models/tiny/versions/1/reference", headers={"Accept": "image/png"})
    document = answer.json()
    table = pa.ipc.open_stream(arrow.content).read_all()

    assert document["model"] == {"name": "tiny", "version": "1"}
    assert document["reference"]["n_cells"] == len(document["cells"]) == len(table) == N_REFERENCE
    assert list(document["cells"][0]) == ["cell_id", "batch", "cell_type", "umap"]
    assert document["cells"][-1]["cell_type"] == "Unlabelled"
    assert [cell["cell_id"] for cell in document["cells"]] == table["cell_id"].to_pylist()
    assert [cell["batch"] for cell in document["cells"]] == table["batch"].to_pylist()
    coordinates = [[cell["umap"]["umap_1"], cell["umap"]["umap_2"]] for cell in document["cells"]]
    assert np.array(coordinates, np.float32).tobytes() == table["umap"].combine_chunks().flatten().to_numpy().tobytes()
    assert (absent.status_code, absent.json()["code"]) == (404, "no_reference")
    assert (other.status_code, other.json()["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize("name", ["nope", "tiny@1", "%2e%2e", "..%2f..%2fetc", "a" * 5000, "%00"])
async def test_models_that_are_not_there(client: httpx.AsyncClient, name: str) -> None:
    """Whatever is not a name is 404, and the file system is not asked."""
    answer = await client.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


async def test_metrics(client: httpx.AsyncClient) -> None:
    """Series of all tasks and error codes are there from the start; 10,000 unknown paths make no new one."""
    text = (await client.get("/metrics")).text
    for task in TASKS:
        assert f'cellserve_stage_seconds_count{{stage="compute",task="{task}"}}' in text
    for code in problems.CODES:
        assert f'cellserve_refused_total{{code="{code}"}}' in text
    await client.get("/some/path")
    before = len((await client.get("/metrics")).text.splitlines())
    for number in range(10_000):
        await client.get(f"/{number}")
    assert len((await client.get("/metrics")).text.splitlines()) == before


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-123", True), ("a" * 128, True), ("", False), ("a" * 129, False), ("a b", False), ("ä", False)],
)
async def test_request_id(client: httpx.AsyncClient, sent: str, kept: bool) -> None:
    """A usable id of the client is kept, any other is replaced by one of ours."""
    given = (await client.get("/livez", headers={"X-Request-ID": sent.encode()})).headers["x-request-id"]
    assert (given == sent) is kept
    assert kept or re.fullmatch(r"[0-9a-f]{32}", given)


def subclasses(base: type) -> set[type]:
    return {base, *(below for sub in base.__subclasses__() for below in subclasses(sub))}


def test_every_error_has_a_status_and_a_code_of_its_own() -> None:
    """A new error without a status, or with another's code, is found here."""
    errors = subclasses(CellserveError)
    assert set(problems.STATUS) == errors
    assert len({error.code for error in errors}) == len(errors)
    for error in errors:
        assert re.fullmatch(r"[a-z_]+", error.code)
        assert error.__doc__


async def test_document_and_routes_agree(client: httpx.AsyncClient) -> None:
    """Each path and method that is served is documented, and the other way round."""
    document = (await client.get("/docs.json")).json()
    documented = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    # How a part of a path is matched is no part of the document.
    served = {
        (re.sub(r":\w+}", "}", route.path), method)
        for route in build_api(client.state).routes
        for method in route.methods - {"HEAD"}
    }

    assert documented == served
    assert document == openapi.document()


def document_of_json() -> dict[str, Any]:
    """The document without Arrow and HDF5 bodies, which no generator knows how to make (tests/service/cells/formats has those)."""
    document = openapi.document()
    for path in (*TASKS, *QUESTIONS, "genes/check"):
        content = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]
        del content["application/vnd.apache.arrow.stream"]
        content.pop("application/x-hdf5", None)
    return document


schema = schemathesis.openapi.from_dict(document_of_json())


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory):
    """A real server of the tiny model: generated requests go over real HTTP."""
    root = tmp_path_factory.mktemp("store")
    write_artifact(root)
    with running_server(root) as url:
        yield url


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_any_documented_request(application: str, case: schemathesis.Case) -> None:
    """Whatever a client sends to a documented path, the answer is a documented one, and never a 500."""
    case.call_and_validate(
        base_url=application,
        checks=[not_a_server_error, status_code_conformance, response_schema_conformance],
        timeout=20,
    )
