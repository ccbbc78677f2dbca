"""`cellserve`: the tasks of the service from the command line, and a look at the models."""

from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn

import orjson
import typer
from rich.console import Console
from rich.table import Table

from service.cells.gene_check import check_genes
from service.contract import artifact
from service.contract.store import ModelId, Store
from service.contract.traffic import Split, Traffic
from service.errors import CellserveError
from service.inference import TASKS, displacement
from service.inference.model import Model, load
from service.inference.questions import QUESTIONS, Question
from service.inference.session import choose_runtime
from service.inference.task import Task
from service.settings import Settings, SettingsError, read_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()


def main() -> None:
    """Run the command line; what a user can mend is said in a sentence, without a trace."""
    try:
        app()
    except (CellserveError, SettingsError, KeyError, OSError) as error:
        _fail(str(error.args[0]) if isinstance(error, KeyError) else str(error))


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)
    raise SystemExit(1)


StoreOption = Annotated[Path | None, typer.Option("--store", help="Directory of models; CELLSERVE_STORE by default.")]


def _store(path: Path | None) -> tuple[Store, Settings]:
    settings = read_settings()
    return Store(path or settings.store), settings


@app.command()
def models(store: StoreOption = None) -> None:
    """List models, versions and aliases."""
    where, _ = _store(store)
    table = Table("model", "version", "aliases", "family", "genes", "latent", "labels", "summary")
    for model_id in where.ids():
        try:
            manifest = artifact.read_manifest(where.path(model_id))
        except CellserveError as error:
            table.add_row(model_id.name, model_id.version, "", "", "", "", "", f"[red]{error}[/red]")
            continue
        aliases = [alias for alias, version in where.aliases(model_id.name).items() if version == model_id.version]
        labels = ", ".join(f"{level.name} ({len(level.classes)})" for level in manifest.labels)
        counts = (str(manifest.genes.n_genes), str(manifest.n_latent))
        table.add_row(
            model_id.name, model_id.version, ", ".join(aliases), manifest.family, *counts, labels, manifest.summary
        )
    console.print(table)


@app.command()
def verify(
    model: Annotated[
        str | None, typer.Argument(help="name, name@version or name@alias; all versions by default.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Check every byte of a version, and replay its golden cells on this machine."""
    where, settings = _store(store)
    runtime = choose_runtime(settings.provider, settings.threads, settings.allow_provider_fallback)
    chosen = where.ids() if model is None else (where.resolve(model),)
    if not chosen:
        _fail(f"There is no model in {where.root}.")
    failed = False
    for model_id in chosen:
        try:
            loaded = load(artifact.read(where.path(model_id)), runtime)
        except CellserveError as error:
            failed = True
            console.print(f"[red]refused[/red] {model_id}: {error}", highlight=False, soft_wrap=True)
            continue
        shapes = loaded.sessions["encode"].shapes
        files = len(loaded.manifest.files)
        console.print(
            f"[green]ok[/green] {model_id}: {files} files, golden cells replayed, one set of bits for {shapes} rows"
        )
    if failed:
        raise SystemExit(1)


@app.command()
def alias(
    model: Annotated[str, typer.Argument(help="name@version")],
    name: Annotated[str, typer.Argument(help="The alias; `default` is what a bare model name means.")] = "default",
    store: StoreOption = None,
) -> None:
    """Let an alias mean a version, from one moment to the next."""
    where, _ = _store(store)
    target = where.resolve(model)
    try:
        where.set_alias(ModelId(target.name, target.version), name)
    except ValueError as error:
        _fail(str(error))
    console.print(f"{target.name}@{name} is {target} now")


@app.command()
def traffic(
    name: Annotated[str, typer.Argument(help="Name of a model.")],
    to: Annotated[str | None, typer.Option(help="Version or alias that gets a share of the requests.")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="That share, from 0 to 1.")] = 0.1,
    shadow: Annotated[
        str | None,
        typer.Option(help="Version or alias that computes the same in the background; only differences are reported."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Split what is asked for by name between two versions, or run a third beside; without options, neither."""
    where, _ = _store(store)
    where.set_traffic(name, Traffic(split=Split(to=to, share=share) if to is not None else None, shadow=shadow))
    split = f"{share:.1%} to {name}@{to}" if to is not None else "all to the default version"
    console.print(f"{name}: {split}{f', with {name}@{shadow} as shadow' if shadow is not None else ''}")


def _offline() -> ModuleType:
    """The module that reads AnnData, which the server does without."""
    try:
        from service import offline
    except ModuleNotFoundError as error:
        _fail(f"{error}. Tasks on .h5ad files need the client's packages: requirements/client.txt.")
    return offline


def _loaded(model: str | None, store: Path | None) -> Model:
    where, settings = _store(store)
    runtime = choose_runtime(settings.provider, settings.threads, settings.allow_provider_fallback)
    return load(artifact.read(where.path(where.resolve(model))), runtime)


def _pairs(option: list[str] | None) -> dict[str, str]:
    """Options by name."""
    pairs = [item.partition("=") for item in option or []]
    if unlike := next((name for name, separator, _ in pairs if not separator), None):
        _fail(f"'{unlike}' is not of the form name=value.")
    return {name: value for name, _, value in pairs}


def _add_command(task: Task) -> None:
    known = ", ".join(f"{name} ({field.description})" for name, field in task.options.model_fields.items()) or "none"

    @app.command(task.name, help=f"{task.summary}, from an .h5ad file into another.")
    def command(
        source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An .h5ad file with raw counts.")],
        target: Annotated[Path, typer.Argument(help="The .h5ad file to write.")],
        model: Annotated[str | None, typer.Option(help="name, name@version or name@alias.")] = None,
        layer: Annotated[
            str | None, typer.Option(help="Layer with raw counts; layers['counts'], raw.X or X by default.")
        ] = None,
        gene_key: Annotated[
            str | None, typer.Option(help="Column of var with gene names; var_names by default.")
        ] = None,
        option: Annotated[list[str] | None, typer.Option(help=f"name=value; options: {known}.")] = None,
        store: StoreOption = None,
    ) -> None:
        offline = _offline()
        loaded = _loaded(model, store)
        answer = offline.run_task(task, loaded, offline.read_h5ad(source), _pairs(option), layer, gene_key)
        answer.write_h5ad(target)
        console.print(f"{answer.n_obs:,} cells answered by {loaded.id}, written to {target}")


for _task in TASKS.values():
    _add_command(_task)


def _add_question(question: Question) -> None:
    known = ", ".join(f"{name} ({field.description})" for name, field in question.options.model_fields.items())

    @app.command(question.name, help=f"{question.summary}, from an .h5ad file; the answer is JSON.")
    def command(
        source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An .h5ad file with raw counts.")],
        model: Annotated[str | None, typer.Option(help="name, name@version or name@alias.")] = None,
        layer: Annotated[
            str | None, typer.Option(help="Layer with raw counts; layers['counts'], raw.X or X by default.")
        ] = None,
        gene_key: Annotated[
            str | None, typer.Option(help="Column of var with gene names; var_names by default.")
        ] = None,
        cluster_key: Annotated[str | None, typer.Option(help="Column of obs with clusters.")] = None,
        option: Annotated[list[str] | None, typer.Option(help=f"name=value; options: {known}.")] = None,
        store: StoreOption = None,
    ) -> None:
        offline = _offline()
        answer = offline.ask(
            question, _loaded(model, store), offline.read_h5ad(source), _pairs(option), layer, gene_key, cluster_key
        )
        _print_json(answer)


for _question in QUESTIONS.values():
    _add_question(_question)


@app.command("genes-check")
def genes_check(
    source: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A file with one name per line, or an .h5ad file.")
    ],
    model: Annotated[str | None, typer.Option(help="name, name@version or name@alias.")] = None,
    gene_key: Annotated[str | None, typer.Option(help="Column of var with gene names; var_names by default.")] = None,
    store: StoreOption = None,
) -> None:
    """What would happen to these genes: matched, missing, renamed, ambiguous, of which species; the answer is JSON."""
    if source.suffix == ".h5ad":
        _, genes, _ = _offline().find_counts(_offline().read_h5ad(source), None, gene_key)
    else:
        genes = [line.strip() for line in source.read_text().splitlines() if line.strip()]
    loaded = _loaded(model, store)
    found, missing = check_genes(loaded.genes, tuple(genes))
    _print_json({**found, "missing_effect_on_golden_cells": displacement.measure(loaded, missing)})


def _print_json(answer: dict[str, Any]) -> None:
    typer.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode())


if __name__ == "__main__":
    main()
