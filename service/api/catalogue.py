"""GET /v1/models and what is below it: which models there are, their manifests, cards and genes."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.state import state
from service.api.tasks import offers
from service.errors import ModelNotFound
from service.inference import TASKS
from service.inference.model import Model


async def list_models(request: Request) -> Response:
    """Every version of every model, with its state and what it offers."""
    models = state(request).models
    loaded, states = models.loaded(), models.states()
    entries = []
    for model_id in models.listing.ids():
        model = loaded.get(model_id)
        aliases = [
            alias for alias, version in models.listing.aliases[model_id.name].items() if version == model_id.version
        ]
        entry: dict[str, Any] = {"name": model_id.name, "version": model_id.version, "aliases": aliases}
        entries.append({**entry, "state": states[str(model_id)], **(_summary(model) if model else {})})
    return JSONResponse({"models": entries})


async def show_model(request: Request) -> Response:
    """A model's manifest and card."""
    model = model_of_path(request)
    return JSONResponse({**_summary(model), "manifest": model.manifest.model_dump(mode="json"), "card": model.card})


async def show_genes(request: Request) -> Response:
    """A model's genes in order, as a table."""
    return Response(model_of_path(request).genes.table.dump(), media_type="text/tab-separated-values; charset=utf-8")


def model_of_path(request: Request) -> Model:
    """The model that a path names, with a version or alias or without.

    Raises:
        ModelNotFound, ModelNotReady.
    """
    name, version = request.path_params["name"], request.path_params.get("version")
    # A name in a path is a name alone: "pbmc@1" there would be two spellings of one resource.
    if "@" in name or "@" in (version or ""):
        raise ModelNotFound(
            model=name[:140], available=", ".join(map(str, state(request).models.listing.ids())) or "none"
        )
    return state(request).models.get(f"{name}@{version}" if version is not None else name)


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
