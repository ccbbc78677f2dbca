"""`python -m training import scvi PATH`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from training.importers import restricted_pickle, scvi_artifact, scvi_file
from training.onnx_graph import Precision

app = typer.Typer(no_args_is_help=True, help="Turn models of other projects into artifacts.")

USER_ERRORS = (
    restricted_pickle.UnsafePickle,
    scvi_artifact.BatchNeeded,
    scvi_artifact.NotScviToolsAnswer,
    scvi_file.NotAnScviModel,
    scvi_file.UnsupportedOption,
)
"""What a user can meet and mend."""


@app.callback()
def imports() -> None:
    """Turn models of other projects into artifacts."""


@app.command(name="scvi")
def import_scvi(
    path: Annotated[Path, typer.Argument(help="Folder that `model.save` wrote.")],
    name: Annotated[str, typer.Option("--name", help="Of the model, in the store and in URLs.")],
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            help="Batch as which new cells are encoded, or 'average'. Default: refuse a model that takes one.",
        ),
    ] = None,
    covariate: Annotated[
        list[str] | None,
        typer.Option("--covariate", help="column=category for a categorical covariate; default: the average."),
    ] = None,
    level: Annotated[str, typer.Option("--label-level", help="Name of the label level of a SCANVI.")] = "cell_type",
    species: Annotated[str, typer.Option("--species", help="Latin name with an underscore.")] = "homo_sapiens",
    licence: Annotated[str, typer.Option("--licence", help="Of the weights.")] = "unknown",
    summary: Annotated[str, typer.Option("--summary", help="One sentence for the card.")] = "",
    min_gene_overlap: Annotated[
        float, typer.Option("--min-gene-overlap", help="Share of the genes that a query must have.")
    ] = 0.5,
    cells: Annotated[
        Path | None, typer.Option("--cells", help="Raw counts to compare with. Default: cells drawn from the model.")
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Of the encoder's first layer. int8: another model, NAME-int8, faster and less exact."),
    ] = "float32",
    scvi_python: Annotated[
        Path | None,
        typer.Option(
            "--scvi-python",
            help="An interpreter with scvi-tools, to compare with. It runs the model's pickle: for trusted files.",
        ),
    ] = None,
    version: Annotated[str | None, typer.Option("--version", help="Default: the next integer.")] = None,
    store: Annotated[Path, typer.Option("--store", help="The models_store.")] = Path("models_store"),
) -> None:
    """Import an SCVI or SCANVI that scvi-tools 0.15 or later saved. Its pickle is read, not run."""
    pairs = dict(one.partition("=")[::2] for one in covariate or ())
    wanted = scvi_artifact.Import(
        name=name,
        batch=batch,
        covariates=pairs,
        level=level,
        species=species,
        licence=licence,
        summary=summary,
        min_gene_overlap=min_gene_overlap,
        cells=cells,
        precision=precision,
        scvi_python=scvi_python,
    )
    Console().print(str(scvi_artifact.import_scvi(path, wanted, store, version)))
