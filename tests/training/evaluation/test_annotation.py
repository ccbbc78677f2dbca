"""Evaluation: every query is scored for ours and for logistic regression, within and across sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

from tests.training.tiny import tiny_config
from training import evaluate as evaluation
from training import run


def test_rows_are_within_and_across_sets(family_run: tuple[run.Run, Path]) -> None:
    """Both are written to evaluation.json, and regression solves the easy tiny sets."""
    made, directory = family_run
    rows = evaluation.evaluate(made, directory)
    assert [row["query"] for row in rows] == [
        "held_out_tiny_a", "held_out_tiny_b", "tiny_a → tiny_b", "tiny_b → tiny_a",
    ]  # fmt: skip
    assert json.loads((directory / evaluation.EVALUATION).read_text()) == rows
    assert all(row["logistic_regression"]["accuracy"] > 0.9 for row in rows)
    assert all(0 <= row["ours"][metric] <= 1 for row in rows for metric in ("accuracy", "macro_f1"))
    (directory / evaluation.EVALUATION).unlink()


def test_the_baseline_is_plain_scikit_learn(family_run: tuple[run.Run, Path]) -> None:
    """LogisticRegression with C=1 on log-normalised counts of the same genes and training cells."""
    train, query = family_run[0].prepared.train, family_run[0].prepared.validation

    def normalise(counts: sp.csr_matrix) -> np.ndarray:
        dense = counts.toarray()
        return np.log1p(dense / np.maximum(dense.sum(axis=1, keepdims=True), 1) * 1e4)

    expected = LogisticRegression(max_iter=1000).fit(normalise(train.counts), train.labels[:, 0])
    found = evaluation.regressions(family_run[0].prepared)["logistic_regression"](query.counts)
    np.testing.assert_array_equal(found, expected.predict(normalise(query.counts)))


def test_macro_f1_averages_over_the_classes_of_the_query(family_run: tuple[run.Run, Path]) -> None:
    """A class that the query lacks is neither a free 1 nor a 0; a perfect answer scores 1."""
    made = family_run[0]
    cells = made.reference[(made.reference.obs["cell_type"] != "NK").to_numpy()]
    codes = {name: i for i, name in enumerate(made.config.labels[0].classes)}
    truth = np.array([codes[label] for label in cells.obs["cell_type"]])
    assert evaluation.score(made.config, cells, made.prepared, lambda counts: truth) == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
    }


def test_a_run_without_labels_cannot_be_scored(tiny_sets: None, tmp_path: Path) -> None:
    """Said with the way out."""
    made = run.fit(tiny_config(labels=[]), tmp_path / "run", show_progress=False)
    with pytest.raises(evaluation.NoLabels, match="labels"):
        evaluation.evaluate(made, tmp_path / "run")
