"""GET /v1/models and what is below it: which models there are, their manifests, cards and genes; and following the store when asked to."""

import asyncio
import hmac
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from service.api.negotiation import answer_format
from service.api.state import state
from service.api.tasks import offers
from service.cells.columns import Column, Labels, Vectors
from service.cells.formats.format import Format
from service.cells.formats.json import FORMAT as JSON
from service.contract.traffic import NO_TRAFFIC
from service.errors import ModelNotFound, NoReference, NotAuthorised, RouteNotFound
from service.inference import TASKS
from service.inference.mapping import UNLABELLED
from service.inference.model import Model

PAGE_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"


async def list_models(request: Request) -> Response:
    """Every version of every model, with its state and what it offers; traffic, and what the store asks for in vain."""
    models = state(request).models
    listing = models.listing
    loaded, states = models.loaded(), models.states()
    entries = []
    for model_id in listing.ids():
        model = loaded.get(model_id)
        aliases = [alias for alias, version in listing.aliases[model_id.name].items() if version == model_id.version]
        entry: dict[str, Any] = {"name": model_id.name, "version": model_id.version, "aliases": aliases}
        # The listing is one moment's, the states may be of the next.
        entries.append({**entry, "state": states.get(str(model_id), "withdrawn"), **(_summary(model) if model else {})})
    traffic = {name: one.model_dump(exclude_none=True) for name, one in listing.traffic.items() if one != NO_TRAFFIC}
    return JSONResponse({"models": entries, "traffic": traffic, "problems": models.problems()})


async def reload(request: Request) -> Response:
    """Follow the store now; answers as `list_models` when that is done. There only where CELLSERVE_ADMIN_TOKEN is set."""
    app = state(request)
    if app.admin_token is None:
        raise RouteNotFound
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), app.admin_token.encode()):
        raise NotAuthorised
    await asyncio.to_thread(app.models.refresh, is_forced=True)
    return await list_models(request)


async def show_model(request: Request) -> Response:
    """A model's manifest and card."""
    model = await model_of_path(request)
    return JSONResponse({**_summary(model), "manifest": model.manifest.model_dump(mode="json"), "card": model.card})


async def show_card(request: Request) -> Response:
    """A model's card: the page where the artifact has one, or else its Markdown."""
    model = await model_of_path(request)
    if not model.page:
        return Response(model.card, media_type="text/markdown; charset=utf-8")
    # Whoever made the artifact wrote the page: the browser is told to run and load nothing of it.
    return HTMLResponse(model.page, headers={"Content-Security-Policy": PAGE_POLICY})


async def show_genes(request: Request) -> Response:
    """A model's genes in order, as a table."""
    return Response(
        (await model_of_path(request)).genes.table.dump(), media_type="text/tab-separated-values; charset=utf-8"
    )


async def show_reference(request: Request) -> Response:
    """The reference cells that a model carries: ids, batch, labels, and coordinates in its UMAP; JSON, or what Accept prefers.

    Raises:
        ModelNotFound, ModelNotReady, NoReference, NotAcceptable.
    """
    model = await model_of_path(request)
    if model.reference is None:
        raise NoReference(model=model.id)
    form = answer_format(request.headers.get("accept"), JSON)
    content = await asyncio.to_thread(_reference, model, form)
    return Response(content, headers={"X-Cellserve-Model": model.id}, media_type=form.media_type)


def _reference(model: Model, form: Format) -> bytes:
    assert model.reference is not None, "the caller looks"
    cells, manifest = model.reference.cells, model.manifest
    columns: dict[str, Column] = {"batch": Labels(cells.batch, manifest.batch.names)}
    for level in manifest.labels:
        if level.name in cells.labels:
            codes = cells.labels[level.name]
            words = (*level.classes, UNLABELLED)
            columns[level.name] = Labels(np.where(codes < 0, len(level.classes), codes).astype(np.int32), words)
    if cells.umap is not None:
        columns["umap"] = Vectors(cells.umap, ("umap_1", "umap_2"))
    assert manifest.reference is not None
    head = {"model": {"name": manifest.name, "version": manifest.version}, "reference": manifest.reference.model_dump()}
    writer = form.writer()
    return writer.start(head) + writer.write(columns, cells.cell_ids) + writer.end()


async def model_of_path(request: Request) -> Model:
    """The model that a path names, with a version or alias or without.

    Raises:
        ModelNotFound, ModelNotReady.
    """
    return await state(request).models.obtain(named(request))


def named(request: Request) -> str:
    """`name` or `name@version` of the path.

    Raises:
        ModelNotFound: it is no name.
    """
    name, version = request.path_params["name"], request.path_params.get("version")
    # A name in a path is a name alone: "pbmc@1" there would be two spellings of one resource.
    if "@" in name or "@" in (version or ""):
        raise ModelNotFound(
            model=name[:140], available=", ".join(map(str, state(request).models.listing.ids())) or "none"
        )
    return f"{name}@{version}" if version is not None else name


def _summary(model: Model) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "family": manifest.family,
        "summary": manifest.summary,
        "species": manifest.genes.species,
        "n_genes": manifest.genes.n_genes,
        "n_latent": manifest.n_latent,
        "batches": list(manifest.batch.names),
        "labels": {level.name: list(level.classes) for level in manifest.labels},
        "tasks": [task.name for task in TASKS.values() if offers(model, task)],
        "provider": model.runtime.provider,
    }
