"""GET /v1/models/{name}/units and /labels: what each latent unit and each label of a model is made of, in genes and gene sets."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.catalogue import model_of_path
from service.contract.impact import ImpactTable
from service.errors import ImpactNotOffered, InvalidOption, LabelNotFound, UnitNotFound
from service.inference.model import Model

TOP, MAX_TOP = 20, 1000
_SHORT = 3
"""Genes and sets per unit or label in a list of all."""


async def list_units(request: Request) -> Response:
    """Every latent unit with its first genes and gene sets."""
    model = await model_of_path(request)
    table = _table(model)
    units = [{"unit": unit, **_first(model, table, unit)} for unit in range(model.manifest.n_latent)]
    return JSONResponse({**_about(model), "units": units})


async def show_unit(request: Request) -> Response:
    """One latent unit."""
    model, top = await model_of_path(request), _top(request)
    table = _table(model)
    text = request.path_params["unit"]
    n_units = model.manifest.n_latent
    if not (text.isascii() and text.isdigit()) or int(text[:9]) >= n_units:
        raise UnitNotFound(model=model.id, unit=text[:40], last=n_units - 1)
    row = int(text)
    genes = _genes(model, table.impact[row], table.impact[row], table.gradient[row], None, top)
    sets = _sets(table, table.set_impact[row], table.set_p[row], table.set_q[row], top)
    return JSONResponse({**_about(model), "unit": row, "genes": genes, "gene_sets": sets})


async def list_labels(request: Request) -> Response:
    """Every label of every level with its first genes and gene sets."""
    model = await model_of_path(request)
    table, row = _table(model), 0
    levels: dict[str, list[dict[str, Any]]] = {}
    for level in model.manifest.labels:
        levels[level.name] = []
        for label in level.classes:
            levels[level.name].append({"label": label, **_first(model, table, model.manifest.n_latent + row, row)})
            row += 1
    return JSONResponse({**_about(model), "levels": levels})


async def show_label(request: Request) -> Response:
    """One label: what speaks for it in its cells, what its log-odds depend on, and in which sets its cells differ from the rest."""
    model, top = await model_of_path(request), _top(request)
    table, manifest = _table(model), model.manifest
    name, label = request.path_params["level"], request.path_params["label"]
    row = 0
    for level in manifest.labels:
        if level.name == name and label in level.classes:
            row += level.classes.index(label)
            break
        row += len(level.classes)
    else:
        known = "; ".join(f"{level.name}: {', '.join(level.classes)}" for level in manifest.labels) or "none"
        raise LabelNotFound(model=model.id, label=f"{name[:40]}/{label[:60]}", known=known)
    at, attribution = manifest.n_latent + row, table.attribution[row]
    genes = _genes(model, np.abs(attribution), table.impact[at], table.gradient[at], attribution, top)
    sets = _sets(table, table.set_impact[at], table.set_p[at], table.set_q[at], top)
    contrast = _sets(table, table.set_contrast[row], table.set_contrast_p[row], table.set_contrast_q[row], top)
    return JSONResponse(
        {**_about(model), "level": name, "label": label, "genes": genes, "gene_sets": sets, "contrast": contrast}
    )


def _table(model: Model) -> ImpactTable:
    if model.impact is None:
        raise ImpactNotOffered(model=model.id)
    return model.impact


def _about(model: Model) -> dict[str, Any]:
    manifest = model.manifest
    assert manifest.impact is not None, "it has a table of it"
    about = manifest.impact.model_dump(mode="json", exclude={"file"})
    return {"model": {"name": manifest.name, "version": manifest.version}, "impact": about}


def _first(model: Model, table: ImpactTable, row: int, class_row: int | None = None) -> dict[str, Any]:
    size = table.impact[row] if class_row is None else np.abs(table.attribution[class_row])
    genes = [model.genes.display(int(at)) for at in _order(-size)[:_SHORT]]
    sets = [table.set_names[at] for at in _set_order(table.set_p[row], table.set_impact[row])[:_SHORT]]
    return {"genes": genes, "gene_sets": sets, "n_gene_sets_below_q_0.05": int((table.set_q[row] < 0.05).sum())}


def _genes(
    model: Model,
    size: NDArray[np.float32],
    impact: NDArray[np.float32],
    gradient: NDArray[np.float32],
    attribution: NDArray[np.float32] | None,
    top: int,
) -> list[dict[str, Any]]:
    """The `top` genes by `size`."""
    found = []
    for at in map(int, _order(-size)[:top]):
        gene: dict[str, Any] = {
            "gene_id": model.genes.table.gene_id[at],
            "gene_symbol": model.genes.table.gene_symbol[at],
        }
        more = {} if attribution is None else {"attribution": float(attribution[at])}
        found.append({**gene, **more, "impact": float(impact[at]), "gradient": float(gradient[at])})
    return found


def _sets(
    table: ImpactTable, effect: NDArray[np.float32], p: NDArray[np.float32], q: NDArray[np.float32], top: int
) -> list[dict[str, Any]]:
    """The `top` gene sets by p, and among equals by effect."""
    return [
        {
            "name": table.set_names[at],
            "n_genes": int(table.set_sizes[at]),
            "effect": float(effect[at]),
            "p": float(p[at]),
            "q": float(q[at]),
        }
        for at in map(int, _set_order(p, effect)[:top])
    ]


def _order(key: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(key, kind="stable")


def _set_order(p: NDArray[np.float32], effect: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.lexsort((-np.abs(effect), p))


def _top(request: Request) -> int:
    """How many genes and sets are asked for.

    Raises:
        InvalidOption: it is no number of them, or something else is asked for.
    """
    if unknown := next((name for name in request.query_params if name != "top"), None):
        raise InvalidOption(name=unknown[:60], problem="unknown; it takes top.")
    text = request.query_params.get("top", str(TOP))
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= MAX_TOP:
        raise InvalidOption(name="top", problem=f"it must be a number from 1 to {MAX_TOP:,}.")
    return int(text)
