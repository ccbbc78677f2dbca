"""The client: where counts are found, how answers fill an AnnData, and what a refusal looks like."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from service.cells.columns import LabelLists, Labels, Values, Vectors
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
        "neighbours": LabelLists(np.arange(n_cells * 2, dtype=np.int32).reshape(n_cells, 2) % 3, ("a", "b", "c")),
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
    assert filled.obsm["neighbours"].iloc[1].tolist() == ["c", "a"]
    assert list(filled.obsm["neighbours"].columns) == ["1", "2"]
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
        filled = client.run("map", filled, k=2)
        whole = client.embed(adata).obsm["X_tiny"]
        assert [model["name"] for model in client.models()] == ["tiny"]
    filled.write_h5ad(tmp_path / "filled.h5ad")
    again = ad.read_h5ad(tmp_path / "filled.h5ad")

    assert again.obsm["X_tiny"].tobytes() == whole.tobytes()
    assert list(again.obsm["expression"].columns) == ["G1", "G5"]
    assert again.obs["predicted_labels"].isin(["B", "T", "NK"]).all()
    assert again.obsm["neighbours"].shape == (6, 2)
    assert again.obsm["neighbours"].map(lambda name: name.startswith("set/")).all(axis=None)
    assert sorted(again.uns["cellserve"]) == ["annotate", "embed", "map", "reconstruct"]


def test_progress_of_a_data_set(url: str, adata: ad.AnnData) -> None:
    """After each piece the caller is told how many cells are answered, and of how many."""
    told: list[tuple[int, int | None]] = []
    with Client(url, cells_per_request=4) as client:
        client.annotate(adata, on_progress=lambda *numbers: told.append(numbers))

    assert told == [(4, 6), (6, 6)]


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


def test_questions_over_http(url: str) -> None:
    """check, markers and check_genes; a column that is not there, and a data set without cells."""
    cells = ad.AnnData(counts(80), var=pd.DataFrame(index=list(gene_table().gene_symbol)))
    cells.obs["group"] = pd.Categorical([f"g{number % 2}" for number in range(80)])
    with Client(url, model="tiny") as client:
        found = client.check(cells, cluster_key="group")
        some = client.check(cells, cluster_key="group", max_cells=50)
        table = client.markers(cells, cluster_key="group", n_genes=4, test="t_test")
        assert client.check_genes(["G1"])["is_refused"]
        with pytest.raises(KeyError, match="group"):
            client.check(cells, cluster_key="nope")
        with pytest.raises(ValueError, match="no cell"):
            client.check(cells[:0])
        with pytest.raises(CellserveProblem, match="min_share"):
            client.check(cells, min_share=3)

    assert set(found["majority_labels"]) == {"g0", "g1"}
    assert sum(cluster["n_cells"] for cluster in found["clusters"].values()) == 80
    assert (some["n_cells"], some["n_cells_drawn_from"]) == (50, 80)
    assert table["group"].tolist() == ["g0"] * 4 + ["g1"] * 4
    assert {"gene_symbol", "score", "q_value", "log2_fold_change"} <= set(table.columns)


def test_votes(url: str, tmp_path) -> None:
    """Majority labels by a column, or by clusters of the latent; what is needed and not there is named; it can be written to .h5ad."""
    cells = ad.AnnData(counts(90), var=pd.DataFrame(index=list(gene_table().gene_symbol)))
    cells.obs["group"] = [f"g{number % 3}" for number in range(90)]
    with Client(url) as client:
        annotated = client.annotate(cells)
        by_group = client.vote(annotated, cluster_key="group", min_share=0.1)
        with pytest.raises(KeyError, match="embed"):
            client.vote(annotated)
        by_latent = client.vote(client.embed(annotated))
        with pytest.raises(KeyError, match="predicted_labels"):
            client.vote(cells, cluster_key="group")

    assert (by_group.obs.groupby("group", observed=True)["majority_labels"].nunique() == 1).all()
    assert "majority_labels" not in annotated.obs
    assert by_latent.obs["over_clustering"].nunique() > 1
    by_latent.write_h5ad(tmp_path / "voted.h5ad")
    about = json.loads(ad.read_h5ad(tmp_path / "voted.h5ad").uns["cellserve"]["vote"])
    assert about["depends_on"] == "all cells of the data set"


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
    assert set(explained.obsm["top_genes"].to_numpy().ravel()) <= set(adata.var_names)
    assert explained.obs["explained"].tolist() == ["NK"] * 6
    explained.write_h5ad(tmp_path / "explained.h5ad")
    again = ad.read_h5ad(tmp_path / "explained.h5ad")
    assert (again.obsm["top_genes"].to_numpy() == explained.obsm["top_genes"].to_numpy()).all()
    weights = np.array([float(value) for value in direction.split(",")])
    difference = latent[[2, 3, 4]].mean(axis=0) - latent[[0, 1]].mean(axis=0)
    np.testing.assert_allclose(weights, difference / np.linalg.norm(difference), rtol=1e-5)
    np.testing.assert_allclose(along.obs["value"], latent @ weights, rtol=1e-4, atol=1e-5)
