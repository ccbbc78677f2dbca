"""`python -m training evaluate | analyse | sample`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from training import config as configuration
from training import run as runs
from training import transfer
from training.data import source
from training.data.prepared import add_labels
from training.data.reference import load_reference
from training.evaluation import description, description_plots, evaluate, models, sampling
from training.evaluation.tables import number, tables

console = Console()

USER_ERRORS = (evaluate.NothingHeldOut, models.NoCheckpoint, sampling.CannotSample)

RunPath = Annotated[Path, typer.Argument(help="Directory that `fit --output` wrote.")]


class Which(StrEnum):
    """Models of a run."""

    best = "best"
    last = "last"
    all = "all"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("evaluate")(evaluate_run)
    app.command("analyse")(analyse)
    app.command("sample")(sample)


def evaluate_run(
    directory: RunPath,
    model: Annotated[
        Which,
        typer.Option("--model", help="best: the epoch that early stopping returns; last: the final epoch; or all."),
    ] = Which.best,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there too, beside RUN/evaluation.json.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", help="A column of obs to compare clusters with, beside the run's labels; several times."
        ),
    ] = None,
    max_cells: Annotated[
        int, typer.Option("--max-cells", min=100, help="Of each part of the split; of more, that many are drawn.")
    ] = evaluate.MAX_CELLS,
    across: Annotated[
        bool, typer.Option("--across/--no-across", help="Train on each data set alone and annotate the others.")
    ] = True,
) -> None:
    """Measure a run: annotation beside logistic regression, loss parts, held-out molecules, likelihood, clusters, batches."""
    which = (models.BEST, models.LAST) if model == Which.all else (model.value,)
    columns = tuple(label or ())

    def show(line: str) -> None:
        console.print(f"[dim]{line}[/dim]")

    document = evaluate.evaluate(runs.load(directory), directory, which, max_cells, columns, across, show)
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    for table in tables(document):
        console.print(table)


def analyse(
    data: Annotated[str, typer.Argument(help="A configuration (.yaml), a registered data set, or a file of cells.")],
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, not rounded; - for standard output.")
    ] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Directory for plots as PNG files.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key.sub=value, wins over the configuration.")
    ] = None,
) -> None:
    """Describe a data set before anything is trained: depth, zeros, batches, classes, most variable genes."""
    if Path(data).suffix in (".yaml", ".yml"):
        config = configuration.load(Path(data), tuple(settings or ()))
        cells, name = load_reference(config.data, config.cells, config.map_symbols, config.seed), config.name
        add_labels(config, cells)
        columns = description.group_columns(cells, config.batch_key, tuple(level.name for level in config.labels))
    else:
        found = transfer.find_data(data)
        cells, name = source.read(found), found if isinstance(found, str) else found.name
        columns = description.group_columns(cells, None, ())
    measured = description.measure(cells, name)
    document = description.describe(cells, measured, name, columns)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    if json_path == Path("-"):
        # Not through the console, which would wrap it.
        typer.echo(text, nl=False)
    else:
        for table in description_tables(document):
            console.print(table)
        if json_path is not None:
            json_path.write_text(text)
    if plots is not None:
        written = description_plots.write(plots, cells, measured, columns)
        if json_path != Path("-"):
            console.print(f"{len(written)} plots in {plots}")


def sample(
    directory: RunPath,
    output: Annotated[Path, typer.Option("--output", help="The .h5ad file to write.")],
    n_cells: Annotated[int, typer.Option("-n", "--cells", min=1, help="Cells to draw.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Technical batch of all cells. Default: as among the training cells.")
    ] = None,
) -> None:
    """Draw cells from a trained generative model: latent from the prior, depth from training cells, counts from the likelihood."""
    drawn = sampling.sample(runs.load(directory), n_cells, seed, batch)
    drawn.write_h5ad(output)
    console.print(f"{drawn.n_obs:,} cells over {drawn.n_vars:,} genes ({drawn.uns['sample']['values']}) in {output}")


def description_tables(document: dict[str, Any]) -> list[Table]:
    """The figures of a data set, rounded."""
    whole = Table("what", "", title=document["name"])
    for key in ("n_cells", "n_cells_without_counts", "n_genes", "n_genes_with_counts", "n_genes_with_id"):
        whole.add_row(key.removeprefix("n_").replace("_", " "), f"{document[key]:,}")
    whole.add_row("counts", f"{document['n_counts']:,.0f}")
    whole.add_row("largest count", f"{document['largest_count']:,.0f}")
    whole.add_row("zeros", f"{document['share_of_zeros']:.2%}")
    whole.add_row("mean of counts above zero", number(document["mean_count_above_zero"], 3))
    share = document["mitochondrial_share"]
    whole.add_row("mitochondrial counts", "-" if share is None else f"{share:.2%}")
    columns = ("minimum", "p05", "median", "mean", "p95", "maximum")
    spread = Table("distribution of", *columns)
    for key in ("counts_per_cell", "genes_per_cell", "cells_per_gene"):
        spread.add_row(key.replace("_", " "), *(f"{document[key][column]:,.0f}" for column in columns))
    found = [whole, spread]
    for column, group in document["groups"].items():
        table = Table(column, "cells", "share", "median counts", "median genes", title=f"by {group['what']}")
        for value, row in group["values"].items():
            medians = (f"{row['median_counts']:,.0f}", f"{row['median_genes']:,.0f}")
            table.add_row(value or "(none)", f"{row['n_cells']:,}", f"{row['share']:.1%}", *medians)
        found.append(table)
    genes = Table("gene", "id", "variance", "mean", "cells", title="most variable genes, ln(1 + counts per 10,000)")
    for gene in document["most_variable_genes"]:
        figures = (number(gene["variance"], 3), number(gene["mean"], 3), f"{gene['share_of_cells']:.1%}")
        genes.add_row(gene["gene_symbol"], gene["gene_id"], *figures)
    return [*found, genes]
