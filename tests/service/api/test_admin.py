"""POST /v1/admin/reload, and what clients see of versions that are exchanged."""

from pathlib import Path

import httpx
import pytest

from service.contract.store import ModelId, Store
from service.contract.traffic import Split, Traffic
from tests.builders import counts, gene_table, json_body, write_artifact, write_mismatch
from tests.conftest import serving

TOKEN = "a token of some length"
JSON = {"Content-Type": "application/json"}
BODY = json_body(counts(3), gene_table().gene_symbol)


async def test_reload(tmp_path: Path) -> None:
    """With the token the store is followed at once, and the answer is the list of models."""
    write_artifact(tmp_path)
    async with serving(tmp_path, admin_token=TOKEN) as client:
        write_artifact(tmp_path, version="2", seed=5)
        answer = await client.post("/v1/admin/reload", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200
        assert [(entry["version"], entry["state"]) for entry in answer.json()["models"]] == [
            ("1", "ready"),
            ("2", "ready"),
        ]
        embedded = await client.post("/v1/embed", content=BODY, headers=JSON)
        assert embedded.headers["x-cellserve-model"] == "tiny@2"
        assert embedded.json()["model"] == {"name": "tiny", "version": "2"}


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer ä"],
)
async def test_without_the_token(tmp_path: Path, authorization: str | None) -> None:
    """Without it, or with another, the call is refused and nothing is read."""
    write_artifact(tmp_path)
    async with serving(tmp_path, admin_token=TOKEN) as client:
        write_artifact(tmp_path, version="2", seed=5)
        headers = {"Authorization": authorization.encode()} if authorization is not None else {}
        answer = await client.post("/v1/admin/reload", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "not_authorised")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in answer.text
        assert client.state.models.get("tiny").id == "tiny@1"


async def test_where_there_is_no_token(client: httpx.AsyncClient) -> None:
    """Without CELLSERVE_ADMIN_TOKEN there is no such path, whatever is sent."""
    answer = await client.post("/v1/admin/reload", headers={"Authorization": "Bearer None"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_bad_version_is_reported(tmp_path: Path) -> None:
    """GET /v1/models says which version is refused and why, and what keeps answering."""
    write_artifact(tmp_path)
    async with serving(tmp_path, admin_token=TOKEN) as client:
        write_mismatch(tmp_path, version="2", seed=5)
        await client.post("/v1/admin/reload", headers={"Authorization": f"Bearer {TOKEN}"})
        document = (await client.get("/v1/models")).json()
        assert document["models"][0]["state"] == "ready"
        assert document["models"][0]["aliases"] == ["default"]
        assert "golden cells differs" in document["models"][1]["state"]
        assert "it still is tiny@1" in document["problems"]["tiny"]
        assert (await client.get("/readyz")).status_code == 200
        answer = await client.post("/v1/embed", content=BODY, headers=JSON)
        assert answer.headers["x-cellserve-model"] == "tiny@1"


async def test_split(tmp_path: Path) -> None:
    """Half of the requests are answered by the canary, the same ones each time, and each answer names its version twice."""
    write_artifact(tmp_path)
    write_artifact(tmp_path, version="2", seed=5)
    store = Store(tmp_path)
    store.set_alias(ModelId("tiny", "1"))
    store.set_traffic("tiny", Traffic(split=Split(to="2", share=0.5)))
    async with serving(tmp_path) as client:
        rounds = []
        for _ in range(2):
            versions = []
            for number in range(60):
                answer = await client.post("/v1/embed", content=BODY, headers={**JSON, "X-Request-ID": f"id-{number}"})
                versions.append(answer.headers["x-cellserve-model"])
                assert versions[-1] == f"tiny@{answer.json()['model']['version']}"
            rounds.append(versions)
        assert rounds[0] == rounds[1]
        assert 12 < rounds[0].count("tiny@2") < 48  # 30 expected; 4.6 standard deviations
        document = (await client.get("/v1/models")).json()
        assert document["traffic"] == {"tiny": {"split": {"to": "2", "share": 0.5}}}


async def test_unloaded(tmp_path: Path) -> None:
    """A model that was unloaded answers as if it had not been, and is listed as what it is."""
    for name in ("a", "b"):
        write_artifact(tmp_path, name=name)
    async with serving(tmp_path, max_loaded=1) as client:
        assert (await client.get("/readyz")).json()["models"] == {"a@1": "unloaded", "b@1": "ready"}
        for name in ("a", "b", "a"):
            answer = await client.post(f"/v1/embed?model={name}", content=BODY, headers=JSON)
            assert answer.headers["x-cellserve-model"] == f"{name}@1"
        assert (await client.get("/readyz")).json()["models"] == {"a@1": "ready", "b@1": "unloaded"}
        assert (await client.get("/v1/models/b")).status_code == 200
