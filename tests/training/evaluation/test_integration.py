"""scib-metrics: batches that mix score above those that do not, and why there are no figures is said."""

import numpy as np
import pytest
import scipy.sparse as sp

from tests.training.evaluation.conftest import hide
from training.data.minibatches import Cells
from training.evaluation.integration import N_NEIGHBOURS, integration


def cells(n: int, n_batches: int = 2) -> Cells:
    """Two batches that differ in half of the genes."""
    generator = np.random.default_rng(0)
    batch = np.arange(n) % n_batches
    rate = 1.0 + 4.0 * ((np.arange(20) < 10)[None, :] == (batch == 0)[:, None])
    return Cells(sp.csr_matrix(generator.poisson(rate).astype(np.float32)), batch, np.zeros((n, 0), dtype=np.int64))


def test_mixed_batches_score_above_separate_ones() -> None:
    """By scib-metrics itself, without labels; the same figures twice."""
    pytest.importorskip("scib_metrics")
    known = cells(120)
    mixed = np.random.default_rng(1).normal(size=(120, 3)).astype(np.float32)
    apart = (mixed + 50 * known.batch[:, None]).astype(np.float32)
    good, bad = integration(mixed, known, None, 0), integration(apart, known, None, 0)
    assert set(good) == {"n_cells", "n_batches", "iLISI", "PCR comparison"}
    assert (good["n_cells"], good["n_batches"]) == (120, 2)
    assert good["iLISI"] > 0.7
    # 59 neighbours of one's own batch come first of the 90.
    assert bad["iLISI"] < good["iLISI"] - 0.1
    assert good["PCR comparison"] > 0.8
    assert bad["PCR comparison"] < 0.2
    assert integration(mixed, known, None, 0) == good


def test_why_there_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch, too few cells, no label on any cell, no package: a sentence each."""
    latent = np.zeros((120, 2), dtype=np.float32)
    assert integration(latent, cells(120, 1), None, 0) == {"skipped": "The cells are of fewer than two batches."}
    assert str(N_NEIGHBOURS) in str(integration(latent[:90], cells(90), None, 0)["skipped"])
    assert "fewer than two batches" in str(integration(latent, cells(120), np.full(120, -1), 0)["skipped"])
    hide(monkeypatch, "scib_metrics")
    assert "not installed" in str(integration(latent, cells(120), None, 0)["skipped"])
