"""The document of an evaluation: the same members for every family, figures that agree with what training wrote."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.training.evaluation.conftest import Evaluated, hide
from tests.training.tiny import register, tiny_config
from training import run
from training.evaluation import annotation, evaluate, models

MEMBERS = {"schema_version", "name", "family", "seed", "cells", "annotation", "models"}
MEASURED = {
    "epoch", "what", "loss", "annotation", "held_out_part", "held_out_molecules", "reconstruction", "latent", "integration",
}  # fmt: skip
WITH_LIKELIHOOD = {"atlas_vae", "autoencoder", "gmvae", "vae"}
VARIATIONAL = {"atlas_vae", "gmvae", "vae"}


def test_every_family_has_the_same_members(evaluated: Evaluated) -> None:
    """docs/evaluate.md lists them; who reads evaluation.json relies on them."""
    made, _, document = evaluated
    assert set(document) == MEMBERS
    assert (document["schema_version"], document["family"]) == (1, made.config.family)
    assert document["cells"]["all"]["n_all"] == made.reference.n_obs
    assert set(document["models"]) == {"best", "last"}
    for model in document["models"].values():
        assert set(model) == MEASURED
        assert set(model["loss"]) == {"train", "validation", "test"}
        assert (model["reconstruction"] is not None) == (made.config.family in WITH_LIKELIHOOD)
        assert {"model", "trivial", "gain", "at_floor", "n_cells", "n_molecules"} == set(model["held_out_molecules"])
        assert set(model["latent"]["test"]) == {"cell_type", "batch"}
        assert ("mixture" in model["latent"]["test"]["cell_type"]) == (made.config.family == "gmvae")
        assert -1 <= model["latent"]["all"]["cell_type"]["silhouette"] <= 1
        assert model["integration"]["label"] == "cell_type"
        assert "not installed" in model["integration"]["skipped"]
    assert document["models"]["last"]["epoch"] == made.provenance["n_epochs"]


def test_annotation_is_that_of_the_served_model(evaluated: Evaluated) -> None:
    """Of the best model, through torch; the rows beside regression come from ONNX Runtime."""
    made, _, document = evaluated
    rows = document["annotation"]
    assert [row["query"] for row in rows] == ["held_out_tiny_a", "held_out_tiny_b"] if rows else []
    assert ("classify" in made.family.graphs()) == bool(rows)
    assert document["models"]["best"]["annotation"] == {row["query"]: row["ours"] for row in rows}


def test_validation_loss_is_that_of_training(evaluated: Evaluated) -> None:
    """metrics.csv has the same figures for the best epoch: same cells, same minibatches, same draws."""
    _, directory, document = evaluated
    best = document["models"]["best"]
    row = pd.read_csv(directory / "metrics.csv").set_index("epoch").loc[best["epoch"] - 1]
    for name, value in best["loss"]["validation"].items():
        if name != "evidence_bound":
            # A mean over all cells here, of minibatches' means in float32 there.
            assert value == pytest.approx(row[f"validation_{name}"], rel=1e-5), name


def test_the_evidence_bound_counts_every_divergence(evaluated: Evaluated) -> None:
    """Of a mixture also that of the components: -bound is the loss of a run with weights of 1 and nothing else in its loss."""
    made, _, document = evaluated
    found = document["models"]["best"]["loss"]["test"]
    assert ("evidence_bound" in found) == (made.config.family in VARIATIONAL)
    if made.config.family == "gmvae":
        assert -found["evidence_bound"] == pytest.approx(found["loss"], rel=1e-6)
    if made.config.family in VARIATIONAL:
        of_latent = found["reconstruction"] + found["divergence"]
        assert -found["evidence_bound"] == pytest.approx(of_latent + found.get("cluster_divergence", 0.0))


@pytest.fixture(scope="module")
def overshooting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose last epoch is not its best."""
    directory = tmp_path_factory.mktemp("overshooting") / "run"
    fit = {"max_epochs": 4, "rows": 32, "device": "cpu", "learning_rate": 30.0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        made = run.fit(tiny_config(fit=fit, labels=[]), directory, show_progress=False)
    assert made.provenance["best_epoch"] < 3
    return directory


def test_the_last_model_is_another_than_the_best(
    overshooting: Path, tiny_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is that of the last row of metrics.csv; only the models that were asked for are measured in full."""
    hide(monkeypatch, "scib_metrics")
    made = run.load(overshooting)
    document = evaluate.evaluate(made, overshooting, (models.LAST,), max_cells=50)
    best, last = document["models"]["best"], document["models"]["last"]
    assert (best["epoch"], last["epoch"]) == (made.provenance["best_epoch"] + 1, 4)
    assert set(best) == {"epoch", "what", "loss"}
    assert set(last) == MEASURED
    row = pd.read_csv(overshooting / "metrics.csv").iloc[-1]
    assert last["loss"]["validation"]["loss"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert document["cells"]["train"] == {"n_cells": 50, "n_all": len(made.prepared.train)}
    assert document["annotation"] == []
    assert last["latent"] == {"test": {}, "all": {}}
    again = evaluate.evaluate(run.load(overshooting), overshooting, (models.LAST,), max_cells=50)
    assert again == document


def test_a_last_model_that_was_not_kept(overshooting: Path, tiny_sets: None, tmp_path: Path, type_words) -> None:
    """Said with the way out; the best one can still be measured."""
    directory = shutil.copytree(overshooting, tmp_path / "run")
    (directory / "checkpoints" / "last.ckpt").unlink()
    (directory / "evaluation.json").unlink(missing_ok=True)  # of the test before
    code, _, err = type_words("evaluate", str(directory), "--model", "last")
    assert (code, "no checkpoints/last.ckpt" in err, "--model best" in err) == (2, True, True)
    assert not (directory / "evaluation.json").exists()


def test_a_run_that_met_all_its_cells_cannot_be_evaluated(
    whole_run: tuple[run.Run, Path], tiny_sets: None, type_words
) -> None:
    """One sentence with the way out, and nothing is written."""
    code, _, err = type_words("evaluate", str(whole_run[1]))
    assert (code, "neither test nor validation cells" in err, "split.test" in err) == (2, True, True)
    assert not (whole_run[1] / "evaluation.json").exists()


def test_without_validation_cells_test_cells_are_measured(
    tiny_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss has no validation part, the best model is the last, and C is chosen on folds of the training cells."""
    hide(monkeypatch, "scib_metrics")
    few = {"logistic_regression_tuned": ((0.01, 1.0), None)}
    monkeypatch.setattr(annotation, "REGRESSIONS", few)
    made = run.fit(tiny_config(split={"validation": 0}), tmp_path, show_progress=False)
    document = evaluate.evaluate(made, tmp_path, is_across=False)
    best = document["models"]["best"]
    assert set(best["loss"]) == {"train", "test"}
    assert (best["held_out_part"], best["epoch"], document["models"]["last"]["epoch"]) == ("test", 3, 3)
    assert all(row["logistic_regression_tuned"]["accuracy"] > 0.9 for row in document["annotation"])


def test_a_column_that_the_cells_lack(overshooting: Path, tiny_sets: None, type_words) -> None:
    """One sentence that names it."""
    code, _, err = type_words("evaluate", str(overshooting), "--label", "donor")
    assert code == 2
    assert "donor" in err


def test_what_json_has_no_number_for_is_null() -> None:
    """Infinities and NaN at any depth."""
    assert json.dumps(evaluate.finite({"a": [float("nan"), 1.0], "b": {"c": float("inf")}}), allow_nan=False) == (
        '{"a": [null, 1.0], "b": {"c": null}}'
    )
