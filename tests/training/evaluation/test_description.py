"""`analyse`: figures of a data set, from a configuration, a registered name or a file, against numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import yaml
from anndata import AnnData

from tests.training.tiny import N_CELLS, N_GENES, SETS, SETTINGS, tiny_cells
from training.evaluation import description


def check(document: dict, counts: np.ndarray) -> None:
    """The whole-matrix figures are those of the dense matrix."""
    assert (document["n_cells"], document["n_genes"]) == counts.shape
    assert document["n_counts"] == counts.sum()
    assert document["largest_count"] == counts.max()
    assert document["share_of_zeros"] == pytest.approx((counts == 0).mean())
    assert document["mean_count_above_zero"] == pytest.approx(counts[counts > 0].mean())
    for key, values in (
        ("counts_per_cell", counts.sum(axis=1)),
        ("genes_per_cell", (counts > 0).sum(axis=1)),
        ("cells_per_gene", (counts > 0).sum(axis=0)),
    ):
        assert document[key]["median"] == np.median(values)
        assert document[key]["p95"] == pytest.approx(np.quantile(values, 0.95))
        assert document[key]["standard_deviation"] == pytest.approx(values.std(), rel=1e-5)
    log = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4)
    first = document["most_variable_genes"][0]
    assert first["variance"] == pytest.approx(log.var(axis=0).max(), rel=1e-4)
    assert first["gene_symbol"] == f"G{log.var(axis=0).argmax()}"


def test_a_configuration(tiny_sets: None, tmp_path: Path, type_words) -> None:
    """Both sets, grouped by the batch and the label that it names; tables, JSON and plots."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    code, out, _ = type_words(
        "analyse", str(tmp_path / "tiny.yaml"), "--json", str(tmp_path / "a.json"), "--plots", str(tmp_path / "plots")
    )
    assert (code, "most variable genes" in out) == (0, True)
    document = json.loads((tmp_path / "a.json").read_text())
    check(document, np.vstack([tiny_cells(name).X.toarray() for name in SETS]).astype(float))
    groups = document["groups"]
    assert {name: group["what"] for name, group in groups.items()} == {"dataset": "batch", "cell_type": "class"}
    assert {value: row["n_cells"] for value, row in groups["dataset"]["values"].items()} == dict.fromkeys(SETS, N_CELLS)
    assert sum(row["share"] for row in groups["cell_type"]["values"].values()) == pytest.approx(1.0)
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert {"counts_per_cell.png", "zeros.png", "pca_dataset.png", "pca_cell_type.png"} <= set(plots)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())


def test_a_file(tmp_path: Path, type_words) -> None:
    """JSON alone on standard output; usual columns group it."""
    cells = tiny_cells(SETS[0])
    del cells.obsm["protein_counts"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    code, out, _ = type_words("analyse", str(tmp_path / "cells.h5ad"), "--json", "-")
    assert code == 0
    document = json.loads(out)
    check(document, cells.X.toarray().astype(float))
    assert set(document["groups"]) == {"cell_type"}


def test_a_file_that_is_not_there(tmp_path: Path, type_words) -> None:
    """One sentence."""
    code, _, err = type_words("analyse", str(tmp_path / "absent.h5ad"))
    assert code == 2
    assert "absent.h5ad" in err


def test_cells_without_counts() -> None:
    """Zeros everywhere: nothing divides by zero, and what is not defined is None."""
    cells = tiny_cells(SETS[0])
    empty = AnnData(sp.csr_matrix((4, N_GENES), dtype=np.float32), obs=cells.obs.iloc[:4], var=cells.var)
    document = description.describe(empty, description.measure(empty, "empty"), "empty", {})
    assert document["n_cells_without_counts"] == 4
    assert document["share_of_zeros"] == 1.0
    assert (document["mean_count_above_zero"], document["mitochondrial_share"]) == (None, None)
    json.dumps(document, allow_nan=False)
