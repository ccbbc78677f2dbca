"""The client: where counts are found, how answers fill an AnnData, and what a refusal looks like."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from service.cells.columns import Labels, Values, Vectors
from service.cells.formats.arrow import ArrowWriter
from service.client import CellserveProblem, Client, fill, find_counts, read_answer
from tests.builders import counts, gene_table, write_artifact
from tests.end_to_end.server import running_server

COUNTS, LOGGED = counts(6), counts(6).log1p()


@pytest.fixture
def adata() -> ad.AnnData:
    """Six cells with logged X, raw counts in a layer, and others in raw."""
    adata = ad.AnnData(COUNTS * 2, var=pd.DataFrame(index=list(gene_table().gene_symbol)))
    adata.raw = adata
    adata.X = LOGGED
    adata.layers["counts"] = COUNTS
    adata.layers["spliced"] = COUNTS.toarray() * 3
    adata.var["ensembl"] = list(gene_table().gene_id)
    adata.obs_names = [f"cell-{number}" for number in range(6)]
    return adata


def test_where_counts_are_found(adata: ad.AnnData) -> None:
    """A named layer; else layers["counts"], raw.X, X; dense or sparse; and it is said which."""

    def found(**arguments: str) -> tuple[float, str, str]:
        matrix, genes, source = find_counts(adata, **arguments)
        return matrix.sum() / COUNTS.sum(), genes[3], source

    assert found() == (1, "RP11-885N19.6", "layers['counts']")
    assert found(layer="spliced") == (3, "RP11-885N19.6", "layers['spliced']")
    assert found(layer="X")[2] == "X"
    assert found(gene_key="ensembl") == (1, "ENSG00000000003", "layers['counts']")
    del adata.layers["counts"]
    assert found() == (2, "RP11-885N19.6", "raw.X")
    adata.raw = None
    assert found()[2] == "X"
    with pytest.raises(KeyError, match="spliced"):
        found(layer="nope")
    with pytest.raises(KeyError, match="ensembl"):
        found(gene_key="nope")


def answer(n_cells: int) -> pa.Table:
    writer = ArrowWriter()
    columns = {
        "latent": Vectors(np.arange(n_cells * 2, dtype=np.float32).reshape(n_cells, 2)),
        "probabilities": Vectors(np.ones((n_cells, 2), np.float32), ("no", "yes")),
        "predicted_labels": Labels(np.arange(n_cells, dtype=np.int32) % 2, ("no", "yes")),
        "is_empty": Values(np.zeros(n_cells, bool)),
    }
    head = {"model": {"name": "m", "version": "1"}, "task": "embed"}
    return read_answer(writer.start(head) + writer.write(columns, None) + writer.end())


def test_filling(adata: ad.AnnData) -> None:
    """Vectors go to obsm (the latent as X_<model>, named ones as data frames), single values to obs; the original stays as it was."""
    filled = fill(adata, [answer(4), answer(2)], "X")

    assert filled.obsm["X_m"][:, 0].tolist() == [0, 2, 4, 6, 0, 2]
    assert list(filled.obsm["probabilities"].columns) == ["no", "yes"]
    assert filled.obs["predicted_labels"].tolist() == ["no", "yes", "no", "yes", "no", "yes"]
    assert filled.obs["predicted_labels"].dtype == "category"
    assert json.loads(filled.uns["cellserve"]["embed"])["counts_source"] == "X"
    assert "X_m" not in adata.obsm
    with pytest.raises(ValueError, match="6 cells, but answers for 5"):
        fill(adata, [answer(5)], "X")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory):
    """A real server of the tiny model."""
    root = tmp_path_factory.mktemp("store")
    write_artifact(root)
    with running_server(root) as url:
        yield url


@pytest.mark.parametrize("cells_per_request", [1, 4, 100])
def test_over_http(url: str, adata: ad.AnnData, cells_per_request: int, tmp_path) -> None:
    """However a data set is cut, the answers are the same; they can be written to .h5ad and read again."""
    with Client(url, model="tiny", cells_per_request=cells_per_request) as client:
        filled = client.reconstruct(client.annotate(client.embed(adata)), genes="G1,G5", library_size=100)
        whole = client.embed(adata).obsm["X_tiny"]
        assert [model["name"] for model in client.models()] == ["tiny"]
    filled.write_h5ad(tmp_path / "filled.h5ad")
    again = ad.read_h5ad(tmp_path / "filled.h5ad")

    assert again.obsm["X_tiny"].tobytes() == whole.tobytes()
    assert list(again.obsm["expression"].columns) == ["G1", "G5"]
    assert again.obs["predicted_labels"].isin(["B", "T", "NK"]).all()
    assert sorted(again.uns["cellserve"]) == ["annotate", "embed", "reconstruct"]


def test_counts_that_do_not_fit_16_bits(url: str, adata: ad.AnnData) -> None:
    """Large counts and counts kept as floats or integers are sent as what they are, and answered the same."""
    adata.layers["counts"] = sp.csr_matrix(COUNTS.toarray() * 70_000)
    with Client(url) as client:
        answers = []
        for dtype in (np.float32, np.float64, np.int64, np.int32):
            adata.layers["counts"] = adata.layers["counts"].astype(dtype)
            answers.append(client.embed(adata).obsm["X_tiny"].tobytes())
    assert len(set(answers)) == 1


def test_a_refusal(url: str, adata: ad.AnnData) -> None:
    """The server's sentence, code and document reach the caller."""
    with Client(url) as client, pytest.raises(CellserveProblem, match="log-normalised") as refused:
        client.embed(adata, layer="X")

    assert (refused.value.code, refused.value.status) == ("not_raw_counts", 422)
    assert refused.value.document["cell"] == "Cell 0"


def test_explanations(adata: ad.AnnData, tmp_path: Path) -> None:
    """Names of genes and what they add come as two tables in obsm, in pieces or not; they can be written and read; groups have a direction."""
    write_artifact(tmp_path)
    with running_server(tmp_path) as url, Client(url, cells_per_request=4) as client:
        explained = client.explain(adata, label="NK", top=3)
        direction = client.direction_between(adata, [0, 1], [2, 3, 4])
        along = client.explain(adata, direction=direction)
        with pytest.raises(ValueError, match="no cell"):
            client.direction_between(adata, [], [1])
        latent = client.embed(adata).obsm["X_tiny"]

    assert explained.obsm["top_genes"].shape == explained.obsm["top_attributions"].shape == (6, 3)
    assert set(explained.obsm["top_genes"].ravel()) <= set(adata.var_names)
    assert explained.obs["explained"].tolist() == ["NK"] * 6
    explained.write_h5ad(tmp_path / "explained.h5ad")
    again = ad.read_h5ad(tmp_path / "explained.h5ad")
    assert (again.obsm["top_genes"] == explained.obsm["top_genes"]).all()
    weights = np.array([float(value) for value in direction.split(",")])
    difference = latent[[2, 3, 4]].mean(axis=0) - latent[[0, 1]].mean(axis=0)
    np.testing.assert_allclose(weights, difference / np.linalg.norm(difference), rtol=1e-5)
    np.testing.assert_allclose(along.obs["value"], latent @ weights, rtol=1e-4, atol=1e-5)
