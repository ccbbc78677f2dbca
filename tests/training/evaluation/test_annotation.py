"""Annotation: every query is scored for ours and for logistic regression, within and across sets."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

from tests.training.tiny import tiny_config
from training import run
from training.evaluation import annotation


@pytest.fixture
def labelled(tiny_sets: None, tmp_path: Path) -> run.Run:
    """A run of one epoch."""
    fit = {"max_epochs": 1, "rows": 32, "device": "cpu"}
    return run.fit(tiny_config(fit=fit), tmp_path / "run", show_progress=False)


def test_rows_are_within_and_across_sets(labelled: run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression solves the easy tiny sets, also where C is chosen."""
    few = {"logistic_regression": ((1.0,), None), "logistic_regression_tuned": ((0.01, 1.0), "balanced")}
    monkeypatch.setattr(annotation, "REGRESSIONS", few)
    rows = annotation.compare_methods(labelled)
    assert [row["query"] for row in rows] == [
        "held_out_tiny_a", "held_out_tiny_b", "tiny_a → tiny_b", "tiny_b → tiny_a",
    ]  # fmt: skip
    assert all(row[name]["accuracy"] > 0.9 for row in rows for name in few)
    assert all(0 <= row["ours"][metric] <= 1 for row in rows for metric in ("accuracy", "macro_f1"))


def test_the_baseline_is_plain_scikit_learn(labelled: run.Run) -> None:
    """LogisticRegression with C=1 on log-normalised counts of the same genes and training cells."""
    train, query = labelled.prepared.train, labelled.prepared.validation

    def normalise(counts: sp.csr_matrix) -> np.ndarray:
        dense = counts.toarray()
        return np.log1p(dense / np.maximum(dense.sum(axis=1, keepdims=True), 1) * 1e4)

    expected = LogisticRegression(max_iter=1000).fit(normalise(train.counts), train.labels[:, 0])
    found = annotation.regressions(labelled.prepared)["logistic_regression"](query.counts)
    np.testing.assert_array_equal(found, expected.predict(normalise(query.counts)))


def test_macro_f1_averages_over_the_classes_of_the_query(labelled: run.Run) -> None:
    """A class that the query lacks is neither a free 1 nor a 0; a perfect answer scores 1."""
    cells = labelled.reference[(labelled.reference.obs["cell_type"] != "NK").to_numpy()]
    codes = {name: i for i, name in enumerate(labelled.config.labels[0].classes)}
    truth = np.array([codes[label] for label in cells.obs["cell_type"]])
    assert annotation.score(labelled.config, cells, labelled.prepared, lambda counts: truth) == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
    }


def test_cells_without_a_label_are_not_scored(labelled: run.Run) -> None:
    """No answer about them could be right."""
    before = {name: len(positions) for name, positions in annotation.query_sets(labelled).items()}
    first = annotation.query_sets(labelled)["held_out_tiny_a"][0]
    column = labelled.reference.obs["cell_type"].astype(object)
    column.iloc[first] = ""
    labelled.reference.obs["cell_type"] = column
    after = {name: len(positions) for name, positions in annotation.query_sets(labelled).items()}
    assert after == before | {"held_out_tiny_a": before["held_out_tiny_a"] - 1}


@pytest.mark.parametrize(("family", "model"), [("vae", {}), ("gmvae", {"n_clusters": 3})])
def test_a_run_without_labels_has_no_rows(family: str, model: dict, tiny_sets: None, tmp_path: Path) -> None:
    """Also that of a mixture, whose `classify` gives clusters."""
    model = {"hidden": [16], "n_latent": 4, **model}
    fit = {"max_epochs": 1, "rows": 32, "device": "cpu"}
    made = run.fit(tiny_config(family=family, model=model, labels=[], fit=fit), tmp_path / "run", show_progress=False)
    assert annotation.compare_methods(made) == []
    assert annotation.annotate(made, made.family) == {}
