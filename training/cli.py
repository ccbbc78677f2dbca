"""`python -m training`: data sets, fit, evaluate, export, reproduce."""

import dataclasses
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.contract import artifact
from service.contract.store import Store
from service.errors import CellserveError
from training import config as configuration
from training import export as exporting
from training import fit as fitting
from training import loggers, parity, run, start, transfer, transfer_cli
from training.calibration import command as calibrating
from training.calibration.calibrate import calibrate
from training.data import errors as data_errors
from training.data import reference, registry
from training.data.readers import pbmc3k
from training.evaluation import command as evaluation
from training.importers import command as importing
from training.onnx_graph import Precision
from training.quantise import NothingToQuantise
from training.report import command as watching
from training.report import report as reporting

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train, evaluate and export reference models.")
app.add_typer(importing.app, name="import")
console = Console()

USER_ERRORS = (
    CellserveError,
    *calibrating.USER_ERRORS,
    *importing.USER_ERRORS,
    *data_errors.USER_ERRORS,
    *evaluation.USER_ERRORS,
    *watching.USER_ERRORS,
    configuration.InvalidConfig,
    exporting.ArtifactTooLarge,
    NothingToQuantise,
    fitting.DeviceUnavailable,
    fitting.LossNotFinite,
    loggers.LoggerUnavailable,
    parity.OutsideTolerance,
    pbmc3k.CountsNotRestored,
    reference.NoCommonGenes,
    registry.HashMismatch,
    registry.NetworkUnavailable,
    registry.NoAddress,
    registry.TruncatedDownload,
    registry.UnknownDataset,
    run.NotARun,
    run.RunExists,
    run.TooFewGenes,
    start.CannotStart,
    transfer.CannotIntegrate,
)
"""What a user can meet and mend: shown as one sentence, without a traceback."""

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, for example training/configs/pbmc.yaml.")]
RunPath = Annotated[Path, typer.Argument(help="Directory that `fit --output` wrote.")]
StorePath = Annotated[Path, typer.Option("--store", help="The models_store.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key.sub=value, wins over the file; may be given several times.")
]


@app.command()
def datasets() -> None:
    """List the data sets: shape, licence, files, and whether they are cached."""
    table = Table("name", "what", "shape", "licence", "files", "cached")
    for dataset in registry.DATASETS.values():
        cached = "yes" if registry.is_cached(dataset) else "no"
        files = "\n".join(file.name for file in dataset.files)
        table.add_row(dataset.name, dataset.summary, dataset.shape, dataset.licence, files, cached)
    console.print(table)
    console.print(f"Cache: {registry.cache_directory()} (set {registry.CACHE_VARIABLE} to use another)")


@app.command()
def fit(
    config: ConfigPath,
    output: Annotated[Path, typer.Option("--output", help="The run directory to write.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="32-true, bf16-mixed, 16-mixed, 64-true.")
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option("--log", help="tensorboard or mlflow, beside metrics.csv; may be given several times."),
    ] = None,
    with_report: Annotated[
        bool, typer.Option("--report", help="Write report.html and plots/ into OUTPUT when training has ended.")
    ] = False,
    settings: Settings = None,
) -> None:
    """Train a model and write a run directory. Ctrl-C ends it after the running epoch and keeps the best model so far."""
    flags = {"fit.device": device, "fit.precision": precision, "fit.loggers": f"[{', '.join(log)}]" if log else None}
    overrides = [*(settings or []), *(f"{key}={value}" for key, value in flags.items() if value)]
    made = run.fit(configuration.load(config, tuple(overrides)), output, resume)
    console.print(f"{output}: {made.outcome}")
    if with_report:
        watching.write_report(made, output, output / reporting.REPORT, output / reporting.PLOTS)


@app.command()
def export(
    directory: RunPath,
    version: Annotated[str | None, typer.Option("--version", help="Default: the next integer.")] = None,
    store: StorePath = Path("models_store"),
    alias: Annotated[str | None, typer.Option("--alias", help="Point this alias to it, for example default.")] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Of the encoder's first layer. int8: another model, NAME-int8, faster and less exact."),
    ] = "float32",
) -> None:
    """Write a run as a version that can be served, after comparing it with torch in float64."""
    console.print(str(exporting.export(run.load(directory), store, version, alias, precision)))


@app.command()
def reproduce(config: ConfigPath, store: StorePath = Path("models_store"), settings: Settings = None) -> None:
    """Train again and compare, byte by byte, every graph of the version that `default` means in the store."""
    wanted = configuration.load(config, tuple(settings or ()))
    shipped = artifact.read_manifest(Store(store).path(Store(store).resolve(wanted.name)))
    with tempfile.TemporaryDirectory() as scratch:
        made = run.fit(wanted, Path(scratch) / "run")
        if shipped.calibration:
            share_of_epochs = shipped.unknown.share_of_epochs if shipped.unknown else 1.0
            n_folds = next(iter(shipped.calibration.values())).n_folds
            found = calibrate(made, share_of_epochs, shipped.unknown is not None, n_folds=n_folds)
            made = dataclasses.replace(made, calibration=found)
        again = artifact.read_manifest(exporting.export(made, Path(scratch) / "store"))
    table = Table("graph", f"sha256 in {shipped.id}", "sha256 again", "same")
    # What an export writes today and did not write then says nothing about the version.
    names = sorted(shipped.graphs)
    digests = [
        tuple(
            manifest.files[f"{name}.onnx"].sha256 if name in manifest.graphs else "-" for manifest in (shipped, again)
        )
        for name in names
    ]
    for name, (before, after) in zip(names, digests, strict=True):
        table.add_row(name, before[:16], after[:16], "yes" if before == after else "no")
    console.print(table)
    if any(before != after for before, after in digests):
        console.print(f"Made on: {shipped.provenance.hardware} with {shipped.provenance.packages}")
        console.print(f"Here: {again.provenance.hardware} with {again.provenance.packages}")
        raise typer.Exit(1)


transfer_cli.register(app)
calibrating.register(app)
evaluation.register(app)
watching.register(app)


def main() -> None:
    """Run a command; what a user can mend is one sentence on standard error and exit code 2."""
    # Other people's deprecations are our tests' business, not a user's.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lightning|torch|anndata|scanpy)\.")
    try:
        app()
    except USER_ERRORS as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)
