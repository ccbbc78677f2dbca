"""TensorBoard and MLflow beside metrics.csv: Lightning's loggers with files in the run directory, and no server."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

from training.config import Config, LoggerName

PACKAGES: dict[LoggerName, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}
"""Module that a logger needs, and the package that brings it."""

TENSORBOARD, MLFLOW = "tensorboard", "mlruns"
"""Folders in the run directory."""


class LoggerUnavailable(Exception):
    """A logger was asked for whose package is not installed."""


def check(names: Sequence[LoggerName]) -> None:
    """Stop before anything is read if a logger cannot work.

    Raises:
        LoggerUnavailable: with the package to install.
    """
    for name in names:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            others = " and ".join(other for other in get_args(LoggerName) if other != name)
            raise LoggerUnavailable(
                f"fit.loggers asks for {name}, whose package is not installed. Run `pip install {package}`, or leave {name} out: metrics.csv "
                f"is written always, and {others} may be there."
            )


def build(config: Config, directory: Path, resume: bool = False, first_step: int = 0) -> list[Logger]:
    """The loggers that `fit.loggers` asks for, told the configuration.

    Args:
        config: of the run.
        directory: of the run.
        resume: go on in the records that are there.
        first_step: of the resumed run; TensorBoard then leaves out what was recorded of later steps.
    """
    made: list[Logger] = []
    for name in config.fit.loggers:
        if name == "tensorboard":
            purge = first_step if resume else None
            made.append(TensorBoardLogger(directory / TENSORBOARD, "", "", default_hp_metric=False, purge_step=purge))
        else:
            made.append(_mlflow(config, (directory / MLFLOW).absolute(), resume))
    for logger in made:
        if not (resume and isinstance(logger, MLFlowLogger)):  # parameters of an MLflow run are written once
            logger.log_hyperparams(config.model_dump(mode="json", exclude={"labels", "limits", "summary"}))
    return made


def _mlflow(config: Config, folder: Path, resume: bool) -> MLFlowLogger:
    # MLflow 3 wants to be told twice that plain files will do; a database would need packages that mlflow-skinny leaves out.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    # It sends its makers figures of use otherwise.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = folder.as_uri()
    run_id = None
    if resume:
        from mlflow.tracking import MlflowClient  # an option, so it is imported where it is used

        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(config.name)
        found = client.search_runs([experiment.experiment_id], max_results=1) if experiment else []
        run_id = found[0].info.run_id if found else None
    return MLFlowLogger(config.name, config.name, uri, run_id=run_id)
