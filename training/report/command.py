"""`python -m training report | compare`: see what runs have become."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training import run as runs
from training.report import compare as comparing
from training.report import report as reporting
from training.report.compare import Comparison
from training.run import Run

console = Console()

USER_ERRORS = (comparing.UnknownPlotFormat,)
"""What a user can meet and mend, beside what loading a run raises."""

_WIDTHS = (34, 16)
"""Characters that the first column of a comparison needs, and each run's at least."""

RunPath = Annotated[Path, typer.Argument(help="Directory that `fit --output` wrote.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(report)
    app.command()(compare)


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


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Directories that `fit --output` wrote.")],
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write everything there, figures and settings uncut.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw validation losses by epoch there; .svg or .png.")
    ] = None,
) -> None:
    """Put runs side by side without loading their cells: what differs in their configurations, losses, figures of `evaluate`."""
    kind = comparing.plot_kind(plot) if plot else ""
    found = comparing.compare(directories)
    for table in _tables(found):
        console.print(table)
    for position, group in enumerate(found.groups):
        console.print(f"{comparing.letter(position)}: {group}", highlight=False, markup=False)
    console.print(comparing.COMPARABLE, highlight=False)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(comparing.document(found), indent=1, allow_nan=False) + "\n")
    if plot:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(comparing.plot(found, kind).data)


def _tables(found: Comparison) -> list[Table]:
    """One table with a column per run, in several pieces where the terminal is too narrow for all."""
    rows = comparing.rows(found)
    labels = [entry.label for entry in found.entries]
    n_columns = max(1, (console.width - _WIDTHS[0]) // _WIDTHS[1])
    pieces = []
    for start in range(0, len(labels), n_columns):
        part = slice(start, start + n_columns)
        table = Table("run", *map(escape, labels[part]))
        for title, values in rows:
            table.add_row(escape(title), *map(escape, values[part]))
        pieces.append(table)
    return pieces
