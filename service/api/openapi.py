"""The OpenAPI document, made from the tables TASKS, FORMATS and STATUS."""

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from service.api import explanations, oip_openapi, problems
from service.api.tasks import MODEL_OPTION
from service.cells.formats import BODIES, FORMATS, IN_MEMORY
from service.inference import TASKS
from service.inference.questions import QUESTIONS, Question
from service.inference.task import Options, Task

VERSION = "1"
_PROBLEM_REF = {"$ref": "#/components/schemas/Problem"}
_PROGRESS = {
    "type": "object",
    "required": ["request_id", "model", "task", "state", "n_cells", "n_received", "n_answered", "seconds"],
    "properties": {
        "request_id": {"type": "string"},
        "model": {"type": "string"},
        "task": {"type": "string"},
        "state": {"type": "string", "enum": ["running", "done", "failed"]},
        "n_cells": {"type": ["integer", "null"], "description": "In all; null while a stream has not ended."},
        "n_received": {"type": "integer"},
        "n_answered": {"type": "integer"},
        "seconds": {"type": "number", "description": "Since the request began, until now or its end."},
        "cells_per_second": {"type": ["number", "null"]},
    },
}
# What a GET can answer besides its content, and a POST besides that.
_EVERYWHERE = (405, 500)
_OF_MODELS = (404, 503)
_OF_TASKS = tuple(sorted(set(problems.STATUS.values()) - {401, 405}))


def document() -> dict[str, Any]:
    """OpenAPI 3.1 of all routes."""
    paths: dict[str, Any] = {f"/v1/{task.name}": {"post": _operation(task)} for task in TASKS.values()}
    paths |= {f"/v1/{question.name}": {"post": _question(question)} for question in QUESTIONS.values()}
    paths["/v1/genes/check"] = {"post": _genes_check()}
    name = _path_parameter("name", "Name of a model.")
    version = _path_parameter("version", "Version or alias.")
    model = _get("A model's manifest and card", "models", _json({"type": "object"}), [name], _OF_MODELS)
    genes = _get("A model's genes in graph order", "models", _text("text/tab-separated-values"), [name], _OF_MODELS)
    card = _get(
        "A model's card: a page, or Markdown where the artifact has no page",
        "models",
        {**_text("text/html"), **_text("text/markdown")},
        [name],
        _OF_MODELS,
    )
    drawn = {
        form.media_type: {
            "schema": {"type": "object"} if "json" in form.media_type else {"type": "string", "format": "binary"}
        }
        for form in FORMATS.values()
    }
    reference = _get(
        "The reference cells that a model carries: ids, batch, labels and coordinates in its UMAP, in the order that map means",
        "models",
        drawn,
        [name],
        (*_OF_MODELS, 406),
    )
    ready = _get("Whether a model answers, and if not, why", "models", _json({"type": "object"}), [name], _OF_MODELS)
    paths |= {
        "/v1/models": {
            "get": _get("All models, versions, aliases and their state", "models", _json({"type": "object"}))
        },
        "/v1/models/{name}": {"get": model},
        "/v1/models/{name}/card": {"get": card},
        "/v1/models/{name}/versions/{version}/card": {"get": {**card, "parameters": [name, version]}},
        "/v1/models/{name}/genes": {"get": genes},
        "/v1/models/{name}/reference": {"get": reference},
        "/v1/models/{name}/versions/{version}/reference": {"get": {**reference, "parameters": [name, version]}},
        "/v1/models/{name}/versions/{version}": {"get": {**model, "parameters": [name, version]}},
        "/v1/models/{name}/versions/{version}/genes": {"get": {**genes, "parameters": [name, version]}},
        **_explanations(name, version),
        "/v1/models/{name}/ready": {"get": ready},
        "/v1/models/{name}/versions/{version}/ready": {"get": {**ready, "parameters": [name, version]}},
        "/v1/requests/{request_id}": {
            "get": _get(
                "How far a streamed or a long request is, while it is answered and for a minute after",
                "operation",
                _json(_PROGRESS),
                [_path_parameter("request_id", "X-Request-ID of the request.")],
                (404,),
            )
        },
        "/v1/admin/reload": {
            "post": _get(
                "Follow the store now: needs the bearer token of CELLSERVE_ADMIN_TOKEN, and is 404 where there is none",
                "operation",
                _json({"type": "object"}),
                (),
                (401, 404),
            )
        },
        "/livez": {
            "get": _get("Whether the process works", "operation", _json({"type": "object"}), (), (503,)),
        },
        "/readyz": {
            "get": _get(
                "Whether every model answers, and if not, why", "operation", _json({"type": "object"}), (), (503,)
            )
        },
        "/metrics": {"get": _get("Metrics for Prometheus", "operation", _text("text/plain"))},
        "/docs.json": {"get": _get("This document", "operation", _json({"type": "object"}))},
        **oip_openapi.paths(name, version),
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cellserve",
            "version": VERSION,
            "summary": "Embed, reconstruct and annotate single cells against a reference model.",
            "description": "Send raw counts. The same cell gets the same bits, alone or among others, whatever the format.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": {"Problem": _problem_schema(), **oip_openapi.SCHEMAS}},
    }


def _explanations(name: dict[str, Any], version: dict[str, Any]) -> dict[str, Any]:
    """What units and labels are made of."""
    top = {
        "name": "top",
        "in": "query",
        "required": False,
        "description": f"Genes, and gene sets, to give; {explanations.TOP} by default.",
        "schema": {"type": "integer", "minimum": 1, "maximum": explanations.MAX_TOP},
    }
    unit, level = _path_parameter("unit", "Latent unit, from 0."), _path_parameter("level", "Label level.")
    label = _path_parameter("label", "Class; a slash in it may stand as it is.")
    one_of = (400, *_OF_MODELS)
    paths: dict[str, Any] = {}
    for model, place in (("/v1/models/{name}", [name]), ("/v1/models/{name}/versions/{version}", [name, version])):
        kinds: tuple[tuple[str, str, list[Any], tuple[int, ...]], ...] = (
            ("/units", "Every latent unit with its first genes and gene sets", [], _OF_MODELS),
            ("/units/{unit}", "Genes and gene sets of a latent unit, with effect, p and q", [unit, top], one_of),
            ("/labels", "Every label with its first genes and gene sets", [], _OF_MODELS),
            (
                "/labels/{level}/{label}",
                "Genes and gene sets of a label, and its contrast",
                [level, label, top],
                one_of,
            ),
        )
        for path, summary, parameters, statuses in kinds:
            content = _json({"type": "object"})
            paths[model + path] = {"get": _get(summary, "models", content, [*place, *parameters], statuses)}
    return paths


def _operation(task: Task) -> dict[str, Any]:
    bodies = "\n".join(f"- `{form.media_type}`: {form.description}" for form in BODIES.values())
    return {
        "operationId": task.name,
        "summary": task.summary,
        "description": f"{task.description}\n\nThe body:\n\n{bodies}",
        "tags": ["tasks"],
        "parameters": _parameters(task.options, *_body_options()),
        "requestBody": {
            "required": True,
            "content": {form.media_type: {"schema": form.schema} for form in BODIES.values()},
        },
        "responses": {
            "200": {
                "description": "One entry per cell, in the order sent. The head says which model answered (`model`), what became of the "
                "genes (`genes`) and what the counts looked like (`counts`).",
                "headers": {
                    "X-Request-ID": {"schema": {"type": "string"}},
                    "X-Cellserve-Model": {"schema": {"type": "string"}},
                    "Server-Timing": {"schema": {"type": "string"}},
                    "X-Cellserve-Cache": {
                        "description": "Where the server has an answer cache: how many cells it knew, as `hits=120, misses=8`.",
                        "schema": {"type": "string"},
                    },
                },
                "content": {form.media_type: {"schema": _answer_schema(form.media_type)} for form in FORMATS.values()},
            },
            **_problems(_OF_TASKS + _EVERYWHERE),
        },
    }


def _parameters(*kinds: type[BaseModel]) -> list[dict[str, Any]]:
    """The model, and the options."""
    schemas = [kind.model_json_schema() for kind in kinds]
    parameters = [
        {
            "name": MODEL_OPTION,
            "in": "query",
            "required": False,
            "description": "`name`, `name@version` or `name@alias`; may be left out where there is one model.",
            "schema": {"type": "string"},
        }
    ]
    return parameters + [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "description": field.get("description", ""),
            "schema": {key: value for key, value in field.items() if key not in ("description", "title", "default")},
        }
        for schema in schemas
        for name, field in schema.get("properties", {}).items()
    ]


def _body_options() -> list[type[BaseModel]]:
    """Query parameters that say how a body is to be read."""
    return [form.options for form in BODIES.values() if form.options is not None]


def _question(question: Question) -> dict[str, Any]:
    """A question about all cells of a request together."""
    content = {form.media_type: {"schema": form.schema} for form in IN_MEMORY.values()}
    return _asked(
        question.name,
        question.summary,
        question.description,
        content,
        question.options,
        ("depends_on", *question.required),
    )


def _genes_check() -> dict[str, Any]:
    names = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 256}, "minItems": 1}
    an_object = {"type": "object", "required": ["genes"], "properties": {"genes": names}}
    content = {
        form.media_type: {
            "schema": {"oneOf": [names, an_object]} if form.media_type == "application/json" else form.schema
        }
        for form in FORMATS.values()
        if form.read_genes is not None
    }
    description = (
        "The body is a JSON list of names, an object with `genes`, or any body of a task but a file: of it only the names of the genes are "
        "read. The answer says what matched and by which kind of name, what is missing, renamed, duplicated, ambiguous or damaged, of which "
        "species the names are, how much the missing genes weigh and how far an embedding can be off for them, and whether cells would be "
        "refused."
    )
    required = ("is_refused", "matched_by", "missing", "species")
    return _asked("genes_check", "What would happen to these genes", description, content, Options, required)


def _asked(
    name: str,
    summary: str,
    description: str,
    content: dict[str, Any],
    options: type[Options],
    required: tuple[str, ...],
) -> dict[str, Any]:
    """A POST that is answered by one JSON object."""
    answer = {"type": "object", "required": ["model", "request_id", *required]}
    return {
        "operationId": name,
        "summary": summary,
        "description": description,
        "tags": ["questions"],
        "parameters": _parameters(options),
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": summary, "content": _json(answer)},
            **_problems(tuple(sorted({*_OF_TASKS} - {406})) + _EVERYWHERE),
        },
    }


def _answer_schema(media_type: str) -> dict[str, Any]:
    if media_type == "text/csv":
        return {"type": "string"}
    if media_type != "application/json":
        return {"type": "string", "format": "binary"}
    return {
        "type": "object",
        "required": ["model", "task", "request_id", "genes", "counts", "cells"],
        "properties": {"cells": {"type": "array", "items": {"type": "object"}, "minItems": 1}},
    }


def _get(
    summary: str,
    tag: str,
    content: dict[str, Any],
    parameters: Any = (),
    statuses: tuple[int, ...] = (),
) -> dict[str, Any]:
    responses = {"200": {"description": summary, "content": content}, **_problems(statuses + _EVERYWHERE)}
    return {"summary": summary, "tags": [tag], "parameters": list(parameters), "responses": responses}


def _problems(statuses: tuple[int, ...]) -> dict[str, Any]:
    """Responses by status, with the codes that each can carry."""
    responses = {}
    for status in sorted(set(statuses)):
        codes = sorted({error.code for error, number in problems.STATUS.items() if number == status})
        responses[str(status)] = {
            "description": f"{HTTPStatus(status).phrase}: {', '.join(codes)}",
            "content": {problems.MEDIA_TYPE: {"schema": _PROBLEM_REF}},
        }
    return responses


def _problem_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "RFC 9457. Further members hold the numbers and names that `detail` mentions.",
        "required": ["type", "title", "status", "detail", "code", "request_id"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string", "description": "What was found, where, and what to do."},
            "code": {"type": "string", "enum": list(problems.CODES), "description": "Stable; branch on this."},
            "request_id": {"type": "string"},
            "trace_id": {"type": "string", "description": "Where the request is traced: 32 hexadecimal digits."},
        },
    }


def _path_parameter(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _text(media_type: str) -> dict[str, Any]:
    return {media_type: {"schema": {"type": "string"}}}
