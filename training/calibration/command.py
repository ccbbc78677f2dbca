"""`python -m training calibrate`: between fit and export."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from training import run as runs
from training.calibration import stored
from training.calibration.calibrate import SHARE_OF_EPOCHS, CannotCalibrate, calibrate
from training.calibration.stored import Calibration, StaleCalibration

USER_ERRORS = (CannotCalibrate, StaleCalibration)
console = Console()


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("calibrate")(command)


def command(
    directory: Annotated[Path, typer.Argument(help="Directory that `fit --output` wrote.")],
    share_of_epochs: Annotated[
        float,
        typer.Option(
            "--share-of-epochs", min=0.01, max=1.0, help="Of fit.max_epochs, for the networks without a type."
        ),
    ] = SHARE_OF_EPOCHS,
    unknown: Annotated[
        bool,
        typer.Option("--unknown/--no-unknown", help="Train without each type in turn, to recognise unknown cells."),
    ] = True,
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds",
            min=2,
            help="Calibrate on all cells of the run: each is judged by one of so many networks, trained without its fold. Default: on the "
            "cells that were set apart.",
        ),
    ] = None,
) -> None:
    """Calibrate probabilities, prediction sets and the recognition of unknown cells of a run; `export` then takes them along."""
    (directory / stored.FIGURES).unlink(missing_ok=True)
    run = runs.load(directory)

    def show(text: str) -> None:
        console.print(f"[dim]{text}[/dim]", highlight=False)

    found = calibrate(run, share_of_epochs, unknown, show, folds)
    stored.write(directory, directory / runs.WEIGHTS, found)
    describe(found)


def describe(found: Calibration) -> None:
    """Say what was found in a few lines."""
    for name, level in found.levels.items():
        console.print(
            f"{name}: {level.method}, log-loss {level.before.log_loss:.4f} → {level.after.log_loss:.4f}, expected calibration error "
            f"{level.before.expected_calibration_error:.4f} → {level.after.expected_calibration_error:.4f}"
        )
    if found.unknown is not None:
        console.print(
            f"unknown cells: {found.unknown.score}, mean AUROC {found.unknown.mean_auroc[found.unknown.score]:.3f}, threshold "
            f"{found.unknown.threshold}"
        )
