"""Antibodies on a common scale, matched by name, and how well they are imputed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from service.contract import artifact
from service.inference import TASKS
from service.inference.model import load
from service.inference.reconstruct import ReconstructOptions
from service.inference.session import Runtime
from tests.training.tiny import TYPES, register, tiny_cells, tiny_config
from training import export as exporting
from training import imputation, run, transfer
from training.data.prepared import encode_obsm
from training.protein import CentredLogRatio

COUNTS = torch.poisson(torch.full((50, 3), 9.0), generator=torch.Generator().manual_seed(0))


def test_centred_log_ratio() -> None:
    """Seurat's margin 2, ln(1 + x / exp(mean ln(1 + x))), then mean 0 and deviation 1; it can be undone."""
    transform = CentredLogRatio(COUNTS)
    counts = COUNTS.double().numpy()
    expected = np.log1p(counts / np.exp(np.log1p(counts).mean(axis=0)))
    expected = (expected - expected.mean(axis=0)) / expected.std(axis=0)
    np.testing.assert_allclose(transform(COUNTS), expected, atol=1e-5)
    np.testing.assert_allclose(transform.expected_counts(transform(COUNTS)), COUNTS, atol=1e-4)


def test_antibodies_that_are_unknown_or_constant() -> None:
    """NaN counts for nothing and stays NaN; nothing is divided by zero."""
    counts = COUNTS.clone()
    counts[:, 1], counts[:, 2], counts[0, 0] = 5.0, torch.nan, torch.nan
    found = CentredLogRatio(counts)(counts)
    assert found[:, 0].isnan().sum() == 1
    assert (found[:, 1] == 0).all()
    assert found[:, 2].isnan().all()
    np.testing.assert_allclose(found[1:, 0], CentredLogRatio(COUNTS[1:])(COUNTS[1:])[:, 0], atol=1e-5)


def test_antibodies_are_matched_by_name() -> None:
    """Sets list them in any order; one that a set lacks is NaN."""
    cells = tiny_cells("tiny_b")
    found = encode_obsm(cells, {"protein_counts": (*TYPES, "CD99")})["protein_counts"]
    assert list(cells.obsm["protein_counts"].columns) != list(TYPES)
    np.testing.assert_array_equal(found[:, :3], cells.obsm["protein_counts"][list(TYPES)])
    assert np.isnan(found[:, 3]).all()
    assert np.isnan(encode_obsm(cells, {"other": ("CD99",)})["other"]).all()


def test_correlations_within_batches() -> None:
    """A difference in depth between batches is no correlation; cells and antibodies without a value are left out."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(100, 2))
    batch = np.repeat(["a", "b"], 50)
    measured = random.normal(size=(100, 2)) + 10.0 * (batch == "b")[:, None]
    imputed = noise + 10.0 * (batch == "b")[:, None]
    imputed[:, 1] = measured[:, 1]
    measured[3, 1] = np.nan
    found = imputation.correlations(measured, imputed, batch.astype(object))
    parts = [np.corrcoef(measured[batch == name, 0], imputed[batch == name, 0])[0, 1] for name in "ab"]
    np.testing.assert_allclose(found, [np.mean(parts), 1.0])
    assert np.corrcoef(measured[:, 0], imputed[:, 0])[0, 1] > 0.9
    assert np.isnan(imputation.correlations(np.ones((9, 1)), np.ones((9, 1)), np.full(9, "a", object))).all()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[run.Run]:
    """A tiny cite_autoencoder, fitted well enough to tell one antibody from another."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        fit = {"max_epochs": 20, "patience": 20, "rows": 16, "learning_rate": 0.01, "device": "cpu"}
        config = tiny_config(family="cite_autoencoder", labels=[], model={"hidden": [16], "n_latent": 4}, fit=fit)
        yield run.fit(config, tmp_path_factory.mktemp("cite") / "run", show_progress=False)


def test_protein_is_imputed_with_its_quality(fitted: run.Run, tmp_path: Path) -> None:
    """Served cells without protein get it by name, and the head says how well that went on held-out cells: here, well."""
    model = load(artifact.read(exporting.export(fitted, tmp_path)), Runtime())
    cells = fitted.test_cells
    answer = TASKS["reconstruct"].run(model, cells.X.tocsr(), ReconstructOptions())["protein"]
    about = ReconstructOptions().about(model)["modalities"]["protein"]

    assert answer.names == TYPES
    assert min(about["quality"].values()) > 0.7
    assert "held-out cells" in about["quality_metric"]
    best = np.array(TYPES)[answer.values.argmax(axis=1)]
    assert (best == cells.obs["cell_type"].astype(str)).mean() > 0.9


def test_measured_protein_moves_the_embedding(fitted: run.Run) -> None:
    """A query with protein is embedded with it too, whatever the order of its antibodies, and without it where it has none."""
    query = tiny_cells("tiny_b")
    answer = transfer.map_query(fitted, query)
    protein = query.obsm["protein_counts"]
    query.obsm["protein_counts"] = protein[protein.columns[::-1]]
    again = transfer.map_query(fitted, query)
    unknown = query.copy()
    unknown.obsm["protein_counts"] = pd.DataFrame(np.nan, index=query.obs_names, columns=protein.columns)
    del query.obsm["protein_counts"]
    without = transfer.map_query(fitted, query)

    np.testing.assert_array_equal(answer.obsm["X_tiny_joint"], again.obsm["X_tiny_joint"])
    assert np.abs(answer.obsm["X_tiny_joint"] - answer.obsm["X_tiny"]).max() > 0.01
    np.testing.assert_allclose(
        transfer.map_query(fitted, unknown).obsm["X_tiny_joint"], answer.obsm["X_tiny"], atol=1e-5
    )
    assert "X_tiny_joint" not in without.obsm
    np.testing.assert_array_equal(without.obsm["X_tiny"], answer.obsm["X_tiny"])
    assert list(without.obsm["imputed_protein"].columns) == list(TYPES)
