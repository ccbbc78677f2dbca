"""Loggers: what they record, and that they change nothing."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import lightning
import pytest

from tests.training.tiny import SETTINGS, tiny_config
from training import fit as fitting
from training import loggers, run
from training.progress import MetricsLog

BOTH = ("tensorboard", "mlflow")


def with_loggers(*names: str, max_epochs: int = 3) -> Any:
    """The tiny configuration with loggers."""
    return tiny_config(fit={**SETTINGS["fit"], "max_epochs": max_epochs, "loggers": names})


class PowerCut(Exception):
    """The process ends in the middle of an epoch."""


class CutInThirdEpoch(MetricsLog):
    """A log that ends the run after two epochs and one minibatch."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise PowerCut


def tensorboard(directory: Path) -> dict[str, list[float]]:
    """All scalars that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / loggers.TENSORBOARD)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow(directory: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Metrics and parameters of the one MLflow run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((directory / loggers.MLFLOW).absolute().as_uri())
    (experiment,) = [found for found in client.search_experiments() if found.name == "tiny"]
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.status == "FINISHED"
    history = {name: client.get_metric_history(one.info.run_id, name) for name in one.data.metrics}
    return {name: [metric.value for metric in values] for name, values in history.items()}, one.data.params


def logged(directory: Path) -> dict[str, list[float]]:
    """metrics.csv by column."""
    with (directory / fitting.METRICS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name.startswith(("train_", "validation_"))}


def test_loggers_record_what_the_table_holds_and_change_no_weight(tiny_sets: None, tmp_path: Path) -> None:
    """With both loggers the weights are the same bytes as without, and both hold each loss of metrics.csv."""
    run.fit(with_loggers(), tmp_path / "plain", show_progress=False)
    run.fit(with_loggers(*BOTH), tmp_path / "logged", show_progress=False)
    plain, watched = ((tmp_path / name / run.WEIGHTS).read_bytes() for name in ("plain", "logged"))
    assert plain == watched
    expected = logged(tmp_path / "logged")
    assert len(expected["validation_loss"]) == 3
    found, parameters = mlflow(tmp_path / "logged")
    assert parameters["model/n_latent"] == "4"
    for record in (tensorboard(tmp_path / "logged"), found):
        assert {name: record[name] for name in expected} == {
            name: pytest.approx(values, rel=1e-5) for name, values in expected.items()
        }


def test_a_resumed_run_goes_on_in_the_same_records(
    tiny_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut and resumed has one record of each epoch, and the weights of an unbroken run without loggers."""
    run.fit(with_loggers(max_epochs=5), tmp_path / "unbroken", show_progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "MetricsLog", CutInThirdEpoch)
        with pytest.raises(PowerCut):
            run.fit(with_loggers(*BOTH, max_epochs=5), tmp_path / "broken", show_progress=False)
    run.fit(with_loggers(*BOTH, max_epochs=5), tmp_path / "broken", resume=True, show_progress=False)
    assert (tmp_path / "broken" / run.WEIGHTS).read_bytes() == (tmp_path / "unbroken" / run.WEIGHTS).read_bytes()
    expected = pytest.approx(logged(tmp_path / "unbroken")["validation_loss"], rel=1e-5)
    assert tensorboard(tmp_path / "broken")["validation_loss"] == expected
    assert mlflow(tmp_path / "broken")[0]["validation_loss"] == expected


def test_a_logger_may_be_added_when_a_run_is_resumed(tiny_sets: None, tmp_path: Path) -> None:
    """Loggers are no part of what a resumed run must agree with."""
    run.fit(with_loggers(), tmp_path, show_progress=False)
    run.fit(with_loggers("tensorboard"), tmp_path, resume=True, show_progress=False)
    assert (tmp_path / loggers.TENSORBOARD).is_dir()


@pytest.mark.parametrize("name", BOTH)
def test_an_absent_package_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence says which package to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(loggers.LoggerUnavailable, match=f"pip install {loggers.PACKAGES[name][1]}"):
        run.fit(with_loggers(name), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()
