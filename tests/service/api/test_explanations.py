"""GET of units and labels: what the table says, in order, and refusals that name what there is."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.builders import CLASSES, N_LATENT, SETS, impact_table, write_artifact
from tests.conftest import serving


async def test_a_unit(client: httpx.AsyncClient) -> None:
    """Genes by impact, sets by p, each with its numbers."""
    document = (await client.get("/v1/models/tiny/units/2?top=5")).json()
    table = impact_table()
    order = np.argsort(-table.impact[2], kind="stable")[:5]

    assert [gene["impact"] for gene in document["genes"]] == pytest.approx(table.impact[2][order].tolist())
    assert [gene["gradient"] for gene in document["genes"]] == pytest.approx(table.gradient[2][order].tolist())
    assert document["genes"][0]["gene_id"] == f"ENSG{order[0]:011d}"
    sets = document["gene_sets"]
    assert {entry["name"] for entry in sets} == set(SETS)
    assert sets[0]["p"] <= sets[1]["p"]
    first = SETS.index(sets[0]["name"])
    assert sets[0]["q"] == pytest.approx(float(table.set_q[2, first]))
    assert sets[0]["effect"] == pytest.approx(float(table.set_impact[2, first]))
    assert document["impact"]["gene_sets"][0]["name"] == "sets.gmt"


async def test_a_label(client: httpx.AsyncClient) -> None:
    """Genes by what they add in the label's own cells, either way; its impacts are the rows after the units."""
    document = (await client.get("/v1/models/tiny/labels/cell_type/NK")).json()
    table, at = impact_table(), CLASSES.index("NK")
    sizes = [abs(gene["attribution"]) for gene in document["genes"]]

    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 20
    best = int(np.abs(table.attribution[at]).argmax())
    assert document["genes"][0]["impact"] == pytest.approx(float(table.impact[N_LATENT + at, best]))
    assert {entry["effect"] for entry in document["contrast"]} == {float(x) for x in table.set_contrast[at]}


async def test_lists(client: httpx.AsyncClient) -> None:
    """Every unit and every label, each with its first genes; by a version, too."""
    units = (await client.get("/v1/models/tiny/versions/1/units")).json()["units"]
    levels = (await client.get("/v1/models/tiny/versions/1/labels")).json()["levels"]

    assert [entry["unit"] for entry in units] == list(range(N_LATENT))
    assert [entry["label"] for entry in levels["cell_type"]] == list(CLASSES)
    assert all(len(entry["genes"]) == 3 and entry["gene_sets"] for entry in [*units, *levels["cell_type"]])
    shown = (await client.get("/v1/models/tiny/units/4")).json()
    assert units[4]["genes"] == [gene["gene_symbol"] for gene in shown["genes"][:3]]


@pytest.mark.parametrize(
    ("path", "status", "code", "said"),
    [
        ("units/5", 404, "unit_not_found", "0 to 4"),
        ("units/-1", 404, "unit_not_found", "0 to 4"),
        ("units/x", 404, "unit_not_found", "'x'"),
        ("labels/cell_type/Q", 404, "label_not_found", "cell_type: B, T, NK"),
        ("labels/tissue/B", 404, "label_not_found", "tissue/B"),
        ("labels/cell_type/B/C", 404, "label_not_found", "cell_type/B/C"),
        ("units/0?top=0", 400, "invalid_option", "1 to 1,000"),
        ("units/0?top=many", 400, "invalid_option", "1 to 1,000"),
        ("labels/cell_type/B?first=3", 400, "invalid_option", "it takes top"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, path: str, status: int, code: str, said: str) -> None:
    """What is not there is 404 with what is; a bad option is 400."""
    answer = await client.get(f"/v1/models/tiny/{path}")

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert said in answer.json()["detail"]


async def test_an_artifact_without_explanations(tmp_path: Path) -> None:
    """An older one serves all else; the task and the tables say that they are not there."""
    write_artifact(tmp_path, is_explained=False)
    async with serving(tmp_path) as client:
        unit = await client.get("/v1/models/tiny/units/0")
        task = await client.post("/v1/explain", json={"genes": ["G1"], "cells": [[1]]})
        listed = (await client.get("/v1/models")).json()["models"][0]

    assert (unit.status_code, unit.json()["code"]) == (404, "impact_not_offered")
    assert (task.status_code, task.json()["code"]) == (404, "task_not_offered")
    assert listed["tasks"] == ["embed", "reconstruct", "annotate", "map", "describe"]
