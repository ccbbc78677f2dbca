"""What a new user will try on day one: each gives a good answer, or an error that says what to do."""

import json

import anndata as ad
import httpx
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from service.client import Client
from service.contract.artifact import Artifact
from tests.builders import arrow_body
from tests.end_to_end.conftest import many
from tests.end_to_end.server import ROOT, Server

JSON = {"Content-Type": "application/json"}
ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}


def refusal(server: Server, body: object, path: str = "/v1/annotate", status: int = 422) -> dict[str, object]:
    """The problem document of a JSON body that is refused."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server.url + path, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()


def test_the_curl_of_the_readme(server: Server) -> None:
    """README's cell is a monocyte, with the very answer that README shows."""
    examples = ROOT / "docs/examples"
    answer = httpx.post(server.url + "/v1/describe", content=(examples / "cell.json").read_bytes(), headers=JSON).json()
    (cell,), (shown,) = answer["cells"], json.loads((examples / "describe.json").read_text())["cells"]

    assert cell["predicted_labels"] == "Monocyte"
    assert list(cell) == list(shown)
    for name in ("predicted_labels_cell_subtype", "top_labels", "prediction_set", "neighbours", "top_genes"):
        assert cell[name] == shown[name]
    for name in ("conf_score", "mapping_score", "vote_share"):
        # 1e-4: another processor may differ in the last bits.
        assert cell[name] == pytest.approx(shown[name], abs=1e-4)


def test_one_cell(server: Server, cells: ad.AnnData) -> None:
    """One cell is answered by every task."""
    one = dict(zip(cells.var_names, cells.X[0].toarray().ravel().tolist(), strict=True))
    body = json.dumps({"genes": list(one), "cells": [one]})
    for task in ("embed", "annotate", "reconstruct", "map", "explain", "describe"):
        answer = httpx.post(f"{server.url}/v1/{task}", content=body, headers=JSON)
        assert answer.status_code == 200
        assert len(answer.json()["cells"]) == 1


def test_50_000_cells_from_python(server: Server, cells: ad.AnnData) -> None:
    """The client sends 50,000 cells in pieces and puts the answer into a copy, in order."""
    query = ad.AnnData(many(cells, 50_000), var=cells.var)
    with Client(server.url) as client:
        answer = client.embed(query)

    assert answer.obsm["X_pbmc"].shape == (50_000, 32)
    assert "X_pbmc" not in query.obsm
    assert json.loads(answer.uns["cellserve"]["embed"])["genes"]["n_missing"] == 0


def test_50_000_cells_in_one_request(server: Server, cells: ad.AnnData) -> None:
    """50,000 cells in one Arrow request stream back whole and in order: each cell as it is answered alone."""
    counts = many(cells, 50_000)
    body = arrow_body(counts, tuple(cells.var_names), compression="zstd")
    answer = httpx.post(server.url + "/v1/annotate", content=body, headers=ARROW, timeout=120)
    table = pa.ipc.open_stream(answer.content).read_all()

    assert len(table) == 50_000
    position = 31_415
    alone = httpx.post(
        server.url + "/v1/annotate", content=arrow_body(counts[position], tuple(cells.var_names)), headers=ARROW
    )
    assert pa.ipc.open_stream(alone.content).read_all()["conf_score"][0] == table["conf_score"][position]


def test_the_published_labels(server: Server, cells: ad.AnnData) -> None:
    """Golden cells, which were held out, get labels of the model, and most of them with confidence."""
    with Client(server.url, model="pbmc@default") as client:
        answer = client.annotate(cells)

    assert set(answer.obs["predicted_labels"]) <= {*answer.obsm["probabilities"].columns, "Unknown"}
    assert answer.obs["conf_score"].median() > 0.8
    np.testing.assert_allclose(answer.obsm["probabilities"].sum(axis=1), 1, atol=1e-5)


def test_mouse_genes(server: Server, cells: ad.AnnData) -> None:
    """Mouse symbols are named as such."""
    names = [name.capitalize() for name in cells.var_names]
    problem = refusal(server, {"genes": names, "cells": [[1] * len(names)]})

    assert problem["code"] == "species_mismatch"
    assert "mouse" in problem["detail"]


def test_mouse_ensembl_ids(server: Server) -> None:
    """Mouse Ensembl ids are named as such, with both species and the evidence."""
    names = [f"ENSMUSG{number:011d}" for number in range(2000)]
    problem = refusal(server, {"genes": names, "cells": [[1] * 2000]})

    assert (problem["species"], problem["guess"]) == ("homo_sapiens", "mus_musculus")
    assert "100% of the names are ids" in problem["evidence"]


def test_wrong_gene_names(server: Server) -> None:
    """Names of nothing are refused with examples of both sides."""
    problem = refusal(server, {"genes": ["gene_1", "gene_2"], "cells": [[1, 2]]})

    assert "gene_1" in problem["query_examples"]
    assert "ENSG" in problem["model_examples"]


def test_log_normalised_values(server: Server, cells: ad.AnnData) -> None:
    """Log-normalised values are refused with the first cell and gene, and what to send."""
    logged = cells.copy()
    totals = np.asarray(logged.X.sum(axis=1))
    logged.X = sp.csr_matrix(np.log1p(logged.X.toarray() / totals * 1e4))
    body = arrow_body(logged.X, tuple(cells.var_names))
    problem = httpx.post(server.url + "/v1/embed", content=body, headers=ARROW).json()

    assert problem["code"] == "not_raw_counts"
    assert problem["cell"] == "Cell 0"
    assert problem["gene"] in cells.var_names
    assert "log-normalised" in problem["detail"]


def test_scaled_values(server: Server, shipped: Artifact) -> None:
    """Negative values are said to look scaled."""
    problem = refusal(server, {"genes": shipped.genes.gene_symbol, "cells": [[-0.5] + [0] * (len(shipped.genes) - 1)]})

    assert "scaled" in problem["detail"]


@pytest.mark.parametrize("wrap", [lambda text: text.encode(), lambda text: {"genes": ["A"], "cells": text}])
def test_a_csv_pasted_as_json(server: Server, wrap) -> None:
    """A table pasted as the body, or as its cells, is recognised, and the JSON form is shown."""
    problem = refusal(server, wrap("cell,CD3D,LYZ\nAAAC,3,0\n"), status=400 if wrap("").__class__ is bytes else 422)

    assert "looks like CSV" in problem["detail"]
    assert '"cells": [[3, 0], [0, 12]]' in problem["detail"]


def test_an_empty_body(server: Server) -> None:
    """Nothing sent is said to be nothing."""
    assert refusal(server, b"", status=400)["code"] == "empty_body"


def test_empty_cells(server: Server, shipped: Artifact) -> None:
    """A cell without counts is answered, flagged and Unknown; no number in the answer is not finite."""
    body = {"genes": shipped.genes.gene_symbol, "cells": [{}, {"LYZ": 3}]}
    for task in ("embed", "annotate", "reconstruct", "map", "explain", "describe"):
        answer = httpx.post(f"{server.url}/v1/{task}", content=json.dumps(body), headers=JSON)
        assert answer.status_code == 200
        assert "NaN" not in answer.text
        assert "null" not in answer.text.split('"cells"')[1]
        assert answer.json()["counts"]["n_empty"] == 1
        assert [cell["is_empty"] for cell in answer.json()["cells"]] == [True, False]
    annotated = httpx.post(server.url + "/v1/annotate", content=json.dumps(body), headers=JSON).json()["cells"]
    assert (annotated[0]["predicted_labels"], annotated[0]["conf_score"]) == ("Unknown", 0)
