"""genes/check, check and markers over HTTP: what they say, what they refuse, and that they disturb no task."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pytest

from service.inference.markers import rank_genes
from service.inference.model import Model
from tests.builders import CLASSES, arrow_body, counts, gene_table, json_body, parts, write_artifact
from tests.conftest import serving

TABLE = gene_table()
JSON = {"Content-Type": "application/json"}
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}
MISSING = {
    "n_cells": 100,
    "n_sets": 10,
    "neighbour_distance": 0.5,
    "weight": [0, 0.5, 1],
    "displacement_median": [0, 1, 2],
    "displacement_90": [0, 2, 4],
    "label_changes": [0, 0.1, 0.3],
}
PROFILE = {
    "n_cells": 500,
    "library_size": {"mean": 50, "quantiles": {"0.05": 20, "0.25": 35, "0.5": 48, "0.75": 60, "0.95": 80}},
    "labels": {},
}


async def post(client: httpx.AsyncClient, path: str, body: Any, headers: dict[str, str] = JSON) -> dict[str, Any]:
    """The answer's object, which has to be a good one."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post(path, content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["model"] == {"name": "tiny", "version": "1"}
    assert answer.headers["x-cellserve-model"] == "tiny@1"
    assert found["request_id"] == answer.headers["x-request-id"]
    return found


async def test_genes_are_checked(client: httpx.AsyncClient) -> None:
    """Every kind of name is counted; renamed, duplicated, missing and damaged names are listed whole."""
    genes = ["OLD0", "ENSG00000000001.3", "G1", "ENSG00000000002", *TABLE.gene_symbol[3:30], "stranger", "1-Mar"]
    found = await post(client, "/v1/genes/check", genes)

    assert not found["is_refused"]
    assert found["matched_by"] == {"id": 1, "id_without_version": 1, "symbol": 28, "alias": 1}
    assert found["renamed"] == {"OLD0": "G0", "ENSG00000000001.3": "G1"}
    assert found["duplicated"] == {"G1": ["ENSG00000000001.3", "G1"]}
    assert (found["n_matched"], found["n_missing"], found["n_unknown"]) == (30, 10, 2)
    assert found["missing"][0] == {"gene_id": "ENSG00000000030", "gene_symbol": "G30", "weight": pytest.approx(1 / 40)}
    assert found["missing_weight"] == pytest.approx(0.25)
    assert (found["missing_effect"], found["missing_effect_on_golden_cells"]) == (None, None)
    assert found["suspect"] == ["1-Mar"]
    assert found["species"]["guess"] == "homo_sapiens"
    assert found["id_type"] == "symbol"


@pytest.mark.parametrize("form", ["list", "object", "cells", "arrow"])
async def test_every_body_has_genes(client: httpx.AsyncClient, form: str) -> None:
    """A list, an object, and the bodies of tasks in both formats say the same."""
    genes = list(TABLE.gene_symbol)
    bodies = {
        "list": (json.dumps(genes).encode(), JSON),
        "object": (json.dumps({"genes": genes}).encode(), JSON),
        "cells": (json_body(counts(2), TABLE.gene_symbol), JSON),
        "arrow": (arrow_body(counts(2), TABLE.gene_symbol), ARROW),
    }
    assert (await post(client, "/v1/genes/check", *bodies[form]))["matched_by"]["symbol"] == 40


async def test_a_schema_without_cells_is_enough(client: httpx.AsyncClient) -> None:
    """An Arrow stream may end after its schema."""
    schema = pa.schema([], metadata={"genes": json.dumps(TABLE.gene_symbol)})
    sink = pa.BufferOutputStream()
    pa.ipc.new_stream(sink, schema).close()
    assert (await post(client, "/v1/genes/check", sink.getvalue().to_pybytes(), ARROW))["n_matched"] == 40


@pytest.mark.parametrize(
    ("genes", "code"),
    [([f"ENSMUSG{n:011d}" for n in range(40)], "species_mismatch"), (["G0", "G1"], "too_few_genes")],
)
async def test_what_would_be_refused_is_said(client: httpx.AsyncClient, genes: list[str], code: str) -> None:
    """The very problem that a task answers with; but the check itself is answered, and a task's is not."""
    found = await post(client, "/v1/genes/check", genes)
    body = {"genes": genes, "cells": [[1] * len(genes)]}
    refused = await client.post("/v1/embed", content=json.dumps(body), headers=JSON)

    assert found["is_refused"]
    assert found["problem"] == {"code": code, "detail": refused.json()["detail"]}
    assert refused.status_code == 422


async def test_what_missing_genes_do(tmp_path: Path) -> None:
    """The table is read at the weight that is missing; golden cells without these very genes move as the encoder says."""
    write_artifact(tmp_path, missing_genes=MISSING)
    async with serving(tmp_path) as client:
        found = await post(client, "/v1/genes/check", list(TABLE.gene_symbol[:30]))
        nothing = await post(client, "/v1/genes/check", list(TABLE.gene_symbol))
        embedded = await post(client, "/v1/embed", json_body(counts(1)[:, :30], TABLE.gene_symbol[:30]))
        model: Model = await client.state.models.obtain("tiny", None)  # type: ignore[attr-defined]

    effect = {"displacement_median": 0.5, "displacement_90": 1.0, "label_changes": 0.05}
    assert found["missing_effect"] == pytest.approx(effect)
    assert embedded["genes"]["missing_effect"] == pytest.approx(effect)
    cells = model.golden_counts.toarray()
    less = np.where(np.arange(40) < 30, cells, 0)
    moved = [np.linalg.norm(a - b) for a, b in zip(*(model.encode(_csr(some)) for some in (cells, less)), strict=True)]
    measured = found["missing_effect_on_golden_cells"]
    assert measured["n_cells"] == 8
    assert measured["displacement_median"] == pytest.approx(np.median(moved) / 0.5, rel=1e-6)
    assert 0 <= measured["label_changes"] <= 1
    assert nothing["missing_effect_on_golden_cells"]["displacement_90"] == 0


async def test_ambiguous_names_are_reported(tmp_path: Path) -> None:
    """A name that may mean a missing gene is not taken for it, and both answers say so; where the gene is there it is of no interest."""
    document, contents = parts()
    table = b"name\tgene_ids\tis_symbol\nTWO\tENSG00000000005|ENSG00000000039\tfalse\nOWN\tENSG00000000006\ttrue\n"
    write_with(tmp_path, document, contents, table)
    async with serving(tmp_path) as client:
        genes = [*TABLE.gene_symbol[:39], "TWO", "OWN"]
        found = await post(client, "/v1/genes/check", genes)
        embedded = await post(client, "/v1/embed", {"genes": genes, "cells": [[1] * 41]})

    assert found["ambiguous"] == {"TWO": {"may_mean": ["G39"], "is_symbol_of_another_gene": False}}
    assert embedded["genes"]["ambiguous"] == {"TWO": ["G39"]}
    assert embedded["genes"]["n_missing"] == 1


def write_with(root: Path, document: dict[str, Any], contents: dict[str, bytes], table: bytes) -> None:
    """The tiny model with a table of ambiguous names."""
    from service.contract import artifact
    from service.contract.manifest import Manifest

    contents["reference/ambiguous_names.tsv"] = table
    document["genes"]["ambiguous_names"] = "reference/ambiguous_names.tsv"
    document["files"] = {file: entry.model_dump() for file, entry in artifact.describe(contents).items()}
    artifact.write(root, Manifest.model_validate(document), contents)


def _csr(dense: np.ndarray) -> Any:
    import scipy.sparse as sp

    return sp.csr_matrix(dense)


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/genes/check", b"{}", "invalid_cells"),
        ("/v1/genes/check", b"[]", "invalid_cells"),
        ("/v1/genes/check", b"[1]", "invalid_cells"),
        ("/v1/genes/check", b"nonsense", "malformed_body"),
        ("/v1/genes/check?nope=1", b'["G0"]', "invalid_option"),
        ("/v1/genes/check?model=nope", b'["G0"]', "model_not_found"),
        ("/v1/check?min_share=2", b"{}", "invalid_option"),
        ("/v1/check", b'{"genes": ["G0"], "cells": []}', "no_cells"),
        ("/v1/check", b'{"genes": ["G0"], "cells": [[1]], "clusters": ["a", "b"]}', "invalid_cells"),
        ("/v1/markers?test=nope", b"{}", "invalid_option"),
        ("/v1/markers?group_by=nope", b"{}", "invalid_option"),
        ("/v1/markers", b'{"genes": ["G0"], "cells": [[1]]}', "too_few_genes"),
        ("/v1/markers?n_genes=0", b"{}", "invalid_option"),
    ],
)
async def test_what_is_refused(client: httpx.AsyncClient, path: str, body: bytes, code: str) -> None:
    """Each thing that is wrong has its code."""
    assert (await client.post(path, content=body, headers=JSON)).json()["code"] == code


@pytest.mark.parametrize("path", ["/v1/genes/check", "/v1/check", "/v1/markers"])
async def test_bounds(tiny_path: Path, path: str) -> None:
    """Bodies and cells are bounded as those of tasks are, and an unknown type is refused."""
    body = json_body(counts(20), TABLE.gene_symbol)
    async with serving(tiny_path, max_body_bytes=1000) as client:
        assert (await client.post(path, content=body, headers=JSON)).json()["code"] == "body_too_large"
        assert (await client.post(path, content=body)).json()["code"] == "unsupported_media_type"
    async with serving(tiny_path, max_cells=19) as client:
        answer = await client.post(path, content=body, headers=JSON)
        assert answer.json().get("code") == ("too_many_cells" if path != "/v1/genes/check" else None)
        client.state.is_draining = True  # type: ignore[attr-defined]
        assert (await client.post(path, content=body, headers=JSON)).json()["code"] == "shutting_down"


async def test_a_good_query_is_green(tmp_path: Path) -> None:
    """Cells like the reference's, with all genes."""
    write_artifact(tmp_path, profile=PROFILE)
    async with serving(tmp_path) as client:
        found = await post(client, "/v1/check", arrow_body(counts(200, seed=3), TABLE.gene_symbol), ARROW)

    colours = {check["check"]: check["verdict"] for check in found["checks"]}
    assert {colours[name] for name in ("missing_genes", "empty", "library_size", "low_counts")} == {"green"}
    assert found["verdict"] == max(colours.values(), key=("green", "amber", "red").index)
    assert found["depends_on"] == "all cells of the request"
    assert sum(found["mapping"]["labels"].values()) == pytest.approx(1)
    assert found["counts"]["reference_library_size"]["0.5"] == 48
    assert found["n_cells"] == 200


@pytest.mark.parametrize(
    ("change", "check", "verdict"),
    [
        ("few_genes", "missing_genes", "red"),
        ("some_genes", "missing_genes", "amber"),
        ("deep", "library_size", "red"),
        ("shallow", "low_counts", "red"),
        ("empty", "empty", "red"),
        ("dates", "damaged_names", "red"),
        ("few_cells", "few_cells", "amber"),
    ],
)
async def test_what_is_wrong_is_seen(tmp_path: Path, change: str, check: str, verdict: str) -> None:
    """Each fault turns its own check, and the verdict with it."""
    write_artifact(tmp_path, profile=PROFILE)
    cells, genes = counts(100, seed=3), list(TABLE.gene_symbol)
    if change.endswith("_genes"):
        n_genes = {"few_genes": 25, "some_genes": 35}[change]
        cells, genes = cells[:, :n_genes], genes[:n_genes]
    elif change == "deep":
        cells.data *= 100
    elif change == "shallow":
        cells.data = (np.arange(cells.nnz) % 7 == 0).astype(np.float32)
    elif change == "empty":
        cells.data[: cells.indptr[30]] = 0
    elif change == "dates":
        cells, genes = cells[:, :39], [*genes[:38], "1-Mar"]
    elif change == "few_cells":
        cells = cells[:5]
    async with serving(tmp_path) as client:
        found = await post(client, "/v1/check", arrow_body(cells, tuple(genes)), ARROW)

    one = next(item for item in found["checks"] if item["check"] == check)
    assert one["verdict"] == verdict
    assert one["message"] in found["reasons"]
    assert ("green", "amber", "red").index(found["verdict"]) >= ("green", "amber", "red").index(verdict)


@pytest.mark.parametrize(
    ("genes", "value", "code"),
    [
        (TABLE.gene_symbol, 1.5, "not_raw_counts"),
        (TABLE.gene_symbol, -1, "not_raw_counts"),
        (tuple(f"ENSMUSG{n:011d}" for n in range(40)), 1, "species_mismatch"),
        (TABLE.gene_symbol[:5], 1, "too_few_genes"),
    ],
)
async def test_what_tasks_refuse_is_red(
    client: httpx.AsyncClient, genes: tuple[str, ...], value: float, code: str
) -> None:
    """A verdict is given, with the words of the refusal."""
    found = await post(client, "/v1/check", {"genes": genes, "cells": [[value] * len(genes)]})
    assert (found["verdict"], found["refused"]["code"]) == ("red", code)
    assert found["reasons"] == [found["refused"]["detail"]]


async def test_majority_labels(client: httpx.AsyncClient) -> None:
    """Each cluster has the label that most of its cells were given; a share that is not reached makes it heterogeneous."""
    cells = counts(120, seed=5)
    clusters = [f"c{number % 3}" for number in range(120)]
    body = json.loads(json_body(cells, TABLE.gene_symbol)) | {"clusters": clusters}
    found = await post(client, "/v1/check", body)
    strict = await post(client, "/v1/check?min_share=1", body)
    annotated = await post(client, "/v1/annotate", json_body(cells, TABLE.gene_symbol))

    labels = np.array([cell["predicted_labels"] for cell in annotated["cells"]])
    for name in ("c0", "c1", "c2"):
        own = labels[np.array(clusters) == name]
        words, numbers = np.unique(own, return_counts=True)
        assert found["clusters"][name]["n_cells"] == 40
        assert numbers[words.tolist().index(found["majority_labels"][name])] == numbers.max()
        assert found["clusters"][name]["share"] == pytest.approx(numbers.max() / 40)
        if len(words) > 1:
            assert strict["majority_labels"][name] == "Heterogeneous"
    assert len(set(labels)) > 1


async def test_clusters_change_no_cell(client: httpx.AsyncClient) -> None:
    """What a cell is answered does not depend on the clusters that were sent with it."""
    body = json.loads(json_body(counts(3), TABLE.gene_symbol))
    plain = await client.post("/v1/annotate", content=orjson.dumps(body), headers=JSON)
    named = await client.post("/v1/annotate", content=orjson.dumps(body | {"clusters": ["a", "b", "a"]}), headers=JSON)
    assert plain.json()["cells"] == named.json()["cells"]


@pytest.mark.parametrize("test", ["t_test", "wilcoxon"])
async def test_markers(client: httpx.AsyncClient, test: str) -> None:
    """Groups by cluster, in Arrow: the genes and figures of `rank_genes`, the highest scores first."""
    cells = counts(90, seed=2).toarray()
    group = np.arange(90, dtype=np.int32) % 3
    cells[group == 1, 11] += 9
    import scipy.sparse as sp

    matrix = sp.csr_matrix(cells)
    body = arrow_body(matrix, TABLE.gene_symbol)
    with pa.ipc.open_stream(body) as reader:
        table = reader.read_all()
    table = table.append_column("cluster", pa.array([f"c{number}" for number in group]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found = await post(
        client, f"/v1/markers?group_by=clusters&test={test}&n_genes=5", sink.getvalue().to_pybytes(), ARROW
    )
    expected = rank_genes(matrix, group, 3, test)

    genes = found["groups"]["c1"]["genes"]
    assert genes[0]["gene_symbol"] == "G11"
    assert len(genes) == 5
    assert genes[0]["score"] == pytest.approx(expected.score[1, 11])
    assert genes[0]["q_value"] == pytest.approx(expected.q_value[1, 11])
    assert [gene["score"] for gene in genes] == sorted((gene["score"] for gene in genes), reverse=True)
    assert found["groups"]["c1"]["n_cells"] == 30
    assert found["depends_on"] == "all cells of the request"


async def test_markers_of_labels(client: httpx.AsyncClient) -> None:
    """By default groups are the predicted labels; those of too few cells are named."""
    found = await post(client, "/v1/markers", json_body(counts(60, seed=1), TABLE.gene_symbol))
    assert set(found["groups"]) | set(found["too_small"]) <= set(CLASSES)
    assert sum(group["n_cells"] for group in found["groups"].values()) + sum(found["too_small"].values()) == 60


async def test_too_much_to_compare(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and counts are bounded, and what is too much is refused with the number that is not."""
    from service.inference import questions

    body = json.loads(json_body(counts(20), TABLE.gene_symbol)) | {"clusters": [str(number) for number in range(20)]}
    monkeypatch.setattr(questions, "MAX_TABLE", 19 * 40)
    answer = await client.post("/v1/markers?group_by=clusters", content=orjson.dumps(body), headers=JSON)
    assert (answer.json()["code"], "at most 19" in answer.json()["detail"]) == ("invalid_option", True)
    monkeypatch.setattr(questions, "MAX_TABLE", 20 * 40)
    monkeypatch.setattr(questions, "MAX_VALUES", 100)
    answer = await client.post("/v1/markers?group_by=clusters", content=orjson.dumps(body), headers=JSON)
    assert (answer.json()["code"], "at most 100 are compared" in answer.json()["detail"]) == ("invalid_cells", True)


async def test_deadlines_hold(client: httpx.AsyncClient) -> None:
    """What cannot be done in the time that the client gives is not begun."""
    body = json_body(counts(20), TABLE.gene_symbol)
    answer = await client.post("/v1/check", content=body, headers={**JSON, "X-Request-Timeout": "0"})
    assert answer.json()["code"] in ("deadline_too_short", "deadline_passed", "timeout")


async def test_verdicts_are_counted(client: httpx.AsyncClient) -> None:
    """By model and colour, also of queries that tasks would refuse; and the cells of questions."""

    async def counted(name: str) -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and "tiny" in line)

    before, cells = (
        await counted("cellserve_query_verdicts_total"),
        await counted('cellserve_cells_total{model="tiny",task="check"'),
    )
    await post(client, "/v1/check", json_body(counts(20), TABLE.gene_symbol))
    await post(client, "/v1/check", {"genes": ["G1"], "cells": [[1]]})
    assert await counted("cellserve_query_verdicts_total") == before + 2
    assert await counted('cellserve_cells_total{model="tiny",task="check"') == cells + 21


async def test_clusters_that_were_not_sent(client: httpx.AsyncClient) -> None:
    """They cannot be compared."""
    body = json_body(counts(5), TABLE.gene_symbol)
    answer = await client.post("/v1/markers?group_by=clusters", content=body, headers=JSON)
    assert answer.json()["code"] == "invalid_option"
