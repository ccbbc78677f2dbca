"""`python -m training map | finetune | retrain | integrate`: what is done with a finished run and more cells."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from training import config as configuration
from training import run as runs
from training import transfer
from training.config import Config
from training.data import source

console = Console()

RunPath = Annotated[Path, typer.Argument(help="Directory that `fit --output` wrote.")]
Query = Annotated[str, typer.Argument(help="A data set by name, or a file in any format that is read.")]
Output = Annotated[Path, typer.Option("--output", help="The run directory to write.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key.sub=value, wins over what is derived.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="wanted=own: a column of a file's obs by another name; may be given several times."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, command in (
        ("map", map_query),
        ("finetune", fine_tune),
        ("retrain", retrain),
        ("integrate", integrate),
    ):
        app.command(name)(command)


def map_query(
    directory: RunPath, query: Query, target: Annotated[Path, typer.Argument(help="The .h5ad file to write.")]
) -> None:
    """Embed, annotate and impute cells with a finished run; nothing is trained."""
    answer = transfer.map_query(runs.load(directory), source.read(transfer.find_data(query)))
    answer.write_h5ad(target)
    console.print(f"{answer.n_obs:,} cells mapped, written to {target}")


def fine_tune(
    directory: RunPath,
    query: Query,
    output: Output,
    only_batches: Annotated[
        bool,
        typer.Option(
            "--only-batches", help="Fit the codes of new batches only: embeddings and labels stay as they are."
        ),
    ] = False,
    with_reference: Annotated[
        bool,
        typer.Option("--with-reference", help="Train on the run's own cells too, so that they are not forgotten."),
    ] = False,
    columns: Columns = None,
    settings: Settings = None,
) -> None:
    """Go on from a finished run with the cells of a query."""
    run = runs.load(directory)
    data = [*(run.config.data if with_reference else ()), transfer.find_data(query, _pairs(columns))]
    _fit(transfer.fine_tuning(run, directory, data, only_batches), output, settings)


def retrain(
    directory: RunPath,
    query: Query,
    output: Output,
    constraint_weight: Annotated[
        float, typer.Option("--constraint-weight", help="How strongly cells are held to where they were.")
    ] = 100.0,
    columns: Columns = None,
    settings: Settings = None,
) -> None:
    """Train on the genes that a run's data share with a query, keeping the embedding that the run's cells have."""
    run = runs.load(directory)
    data = [transfer.find_data(query, _pairs(columns))]
    _fit(transfer.retraining(run, directory, data, constraint_weight), output, settings)


def integrate(
    one: RunPath,
    other: Annotated[Path, typer.Argument(help="The run directory of another atlas.")],
    output: Output,
    settings: Settings = None,
) -> None:
    """Train on the data of two runs with the labels of both, and write which classes correspond to label_alignment.tsv."""
    _fit(transfer.integration(runs.load(one), runs.load(other)), output, settings)
    run = runs.load(output)
    if len(run.config.labels) > 1:
        table = transfer.label_alignment(run)
        table.to_csv(output / "label_alignment.tsv", sep="\t", index=False, float_format="%.4f")
        console.print(table[table["is_match"]].to_string(index=False))


def _fit(config: Config, output: Path, settings: list[str] | None) -> None:
    made = runs.fit(configuration.override(config, tuple(settings or ())), output)
    console.print(f"{output}: {made.outcome}")


def _pairs(columns: list[str] | None) -> dict[str, str]:
    pairs = [column.partition("=") for column in columns or ()]
    if unlike := next((wanted for wanted, separator, _ in pairs if not separator), None):
        raise configuration.InvalidConfig(f"'{unlike}' is not of the form wanted=own.")
    return {wanted: own for wanted, _, own in pairs}
