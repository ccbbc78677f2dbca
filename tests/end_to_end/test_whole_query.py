"""genes/check, check and markers of the shipped model by a real server: real cells, and cells with what users do to them."""

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from service.cells.genes import GeneIndex, align
from service.client import CellserveProblem, Client, find_counts
from service.contract.artifact import Artifact
from tests.end_to_end.server import Server
from tests.training.tiny import read_or_skip


@pytest.fixture(scope="module")
def pbmc(shipped: Artifact) -> ad.AnnData:
    """The cells of pbmc3k by symbol."""
    adata = read_or_skip("pbmc3k").copy()
    adata.var_names = adata.var["gene_symbol"].astype(str)
    adata.var_names_make_unique()
    return adata


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    """A client of the shipped model."""
    with Client(server.url, model="pbmc") as client:
        yield client


def test_good_cells_are_not_red(client: Client, pbmc: ad.AnnData) -> None:
    """Cells of a data set that the model was trained on have all genes, map well, and have the labels that annotate gives."""
    found = client.check(pbmc)
    labels = client.annotate(pbmc).obs["predicted_labels"].value_counts(normalize=True)

    assert found["verdict"] != "red"
    assert found["mapping"]["share_mapped_well"] > 0.9
    assert {check["check"]: check["verdict"] for check in found["checks"]}["missing_genes"] == "green"
    assert found["mapping"]["labels"] == pytest.approx({name: share for name, share in labels.items() if share})


@pytest.mark.parametrize("damage", ["log", "half_of_the_genes", "mouse"])
def test_damaged_cells_are_red(client: Client, pbmc: ad.AnnData, damage: str) -> None:
    """Log values, a matrix of variable genes only, and mouse symbols each give a reason that names them."""
    adata, word = pbmc[:300].copy(), "missing"
    if damage == "log":
        adata.X, word = adata.X.log1p(), "log-normalised"
    elif damage == "mouse":
        adata.var_names, word = [name.capitalize() for name in adata.var_names], "mouse"
    else:
        adata = adata[:, np.random.default_rng(0).permutation(adata.n_vars)[: int(adata.n_vars * 0.55)]]
    found = client.check(adata)

    assert found["verdict"] == "red"
    assert any(word in reason for reason in found["reasons"])


def test_more_cells_than_are_sent(client: Client, pbmc: ad.AnnData) -> None:
    """Of a large data set some are drawn, and it is said; the same each time."""
    found, again = (client.check(pbmc, max_cells=500) for _ in range(2))
    assert (found["n_cells"], found["n_cells_drawn_from"]) == (500, pbmc.n_obs)
    assert found["mapping"] == again["mapping"]


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # scanpy's own, at genes that no cell has
@pytest.mark.parametrize(("test", "method"), [("wilcoxon", "wilcoxon"), ("t_test", "t-test")])
def test_markers_are_scanpys(client: Client, shipped: Artifact, pbmc: ad.AnnData, test: str, method: str) -> None:
    """The 50 best genes of each predicted label have the scores and q-values that scanpy gives the same cells over the model's genes."""
    found = client.markers(pbmc, test=test, n_genes=50)
    labels = client.annotate(pbmc).obs["predicted_labels"].astype(str)
    counts, genes, _ = find_counts(pbmc)
    positions, _ = GeneIndex(shipped.genes, "pbmc@1", 0.5).locate(tuple(genes))
    adata = ad.AnnData(align(counts, positions, len(shipped.genes)).astype(np.float64))
    adata.var_names = list(shipped.genes.gene_symbol)
    adata.obs["label"] = pd.Categorical(labels.to_numpy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    groups = list(found["group"].unique())
    sc.tl.rank_genes_groups(adata, "label", groups=groups, method=method, tie_correct=True)

    for group in groups:
        theirs = sc.get.rank_genes_groups_df(adata, group).set_index("names")
        ours = found[found["group"] == group].set_index("gene_symbol")
        assert set(ours.index[:20]) == set(theirs.index[:20])
        # Shares that are equal are tied here; scanpy rounds twice, which breaks some of the ties and moves a rank sum a little.
        np.testing.assert_allclose(ours["score"], theirs.loc[ours.index, "scores"], rtol=1e-3)
        # A q-value of 1e-180 is the difference of scores that scanpy keeps in float32, many times over.
        ours_log, theirs_log = (
            np.log10(np.maximum(q, 1e-300)) for q in (ours["q_value"], theirs.loc[ours.index, "pvals_adj"])
        )
        np.testing.assert_allclose(ours_log, theirs_log, rtol=1e-4, atol=0.01)


def test_known_markers(client: Client, pbmc: ad.AnnData) -> None:
    """B cells are told by CD79A, NK cells by NKG7, monocytes by LYZ."""
    found = client.markers(pbmc)
    genes = {group: set(table["gene_symbol"]) for group, table in found.groupby("group")}
    for word, gene in (("B", "CD79A"), ("NK", "NKG7"), ("ono", "LYZ")):
        assert any(gene in names for group, names in genes.items() if word in group), (word, genes)


def test_majority_labels(client: Client, pbmc: ad.AnnData) -> None:
    """Voting over clusters of the latent is deterministic, says what it depends on, and agrees with the server's for the same clusters."""
    annotated = client.annotate(client.embed(pbmc[:600]))
    voted = client.vote(annotated)
    again = client.vote(annotated)
    found = client.check(voted, cluster_key="over_clustering")

    assert voted.obs["majority_labels"].tolist() == again.obs["majority_labels"].tolist()
    assert "all cells of the data set" in voted.uns["cellserve"]["vote"]
    clusters = voted.obs["over_clustering"].astype(str)
    assert clusters.nunique() > 5
    server_says = [found["majority_labels"][name] for name in clusters]
    is_tied = [
        list(found["clusters"][name]["labels"].values())[:2].count(found["clusters"][name]["share"]) > 1
        for name in clusters
    ]
    same = [
        tied or ours == theirs
        for tied, ours, theirs in zip(is_tied, voted.obs["majority_labels"], server_says, strict=True)
    ]
    assert all(same)


def test_genes_of_real_cells(client: Client, pbmc: ad.AnnData) -> None:
    """All symbols of a data set are human, and those of the model are found by symbol or alias."""
    found = client.check_genes(pbmc.var_names)
    assert (found["species"]["guess"], found["is_refused"]) == ("homo_sapiens", False)
    assert found["n_matched"] == found["n_model_genes"] - found["n_missing"]
    assert found["matched_by"]["symbol"] >= 0.95 * found["n_model_genes"]
    assert sum(found["matched_by"].values()) == found["n_matched"] + sum(
        len(names) - 1 for names in found["duplicated"].values()
    )
    mouse = client.check_genes(name.capitalize() for name in pbmc.var_names)
    assert (mouse["problem"]["code"], mouse["species"]["guess"]) == ("species_mismatch", "mus_musculus")


def test_a_mouse_is_refused(client: Client, pbmc: ad.AnnData) -> None:
    """A task says why, with the evidence."""
    mouse = pbmc[:3].copy()
    mouse.var_names = [name.capitalize() for name in mouse.var_names]
    with pytest.raises(CellserveProblem, match="written as mouse and rat symbols are") as refused:
        client.embed(mouse)
    assert (refused.value.status, refused.value.code) == (422, "species_mismatch")
