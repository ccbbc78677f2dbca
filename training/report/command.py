"""`python -m training report | compare`: see what runs have become."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from training import run as runs
from training.report import report as reporting
from training.run import Run

console = Console()

RunPath = Annotated[Path, typer.Argument(help="Directory that `fit --output` wrote.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(report)


def report(
    directory: RunPath,
    output: Annotated[
        Path | None, typer.Option("--output", help="The page; report.html in the run by default.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="A folder for the plots as files.")] = None,
    n_cells: Annotated[
        int,
        typer.Option("--cells", min=1, help="Cells that are shown, and measured, at most; drawn with a fixed seed."),
    ] = reporting.N_CELLS,
) -> None:
    """Write one HTML page about a run that opens anywhere: curves, latent, reconstructions, answers, clusters, how it was made."""
    write_report(runs.load(directory), directory, output or directory / reporting.REPORT, plots, n_cells)


def write_report(made: Run, directory: Path, page: Path, plots: Path | None, n_cells: int = reporting.N_CELLS) -> None:
    """Make a report, write it, and say where it is."""
    reporting.write(reporting.make(made, directory, n_cells), page, plots)
    console.print(f"{page} written" + (f", plots in {plots}" if plots else ""))
