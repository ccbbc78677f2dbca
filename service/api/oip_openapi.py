"""The Open Inference Protocol's part of the OpenAPI document."""

from typing import Any

from service.api import problems
from service.cells.formats.tensor_cells import INPUTS

ERROR = {"$ref": "#/components/schemas/InferenceError"}
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string", "enum": ["FP32", "INT64", "BYTES", "BOOL"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}},
    },
}
SCHEMAS: dict[str, Any] = {
    "InferenceError": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
    "InferenceTensor": _TENSOR,
    "InferenceRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/InferenceTensor"}},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                },
            },
        },
    },
    "InferenceResponse": {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "id": {"type": "string"},
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "parameters": {"type": "object"},
            "outputs": {"type": "array", "items": {"$ref": "#/components/schemas/InferenceTensor"}},
        },
    },
}
_OF_MODELS = (404, 503)
_OF_BODIES = (400, 408, 413, 415, 429)


def paths(name: dict[str, Any], version: dict[str, Any]) -> dict[str, Any]:
    """The protocol's paths; the arguments are the parameters of a model's path."""
    found = {
        "/v2": {"get": _operation("What serves, and which extensions it speaks")},
        "/v2/health/live": {"get": _operation("Whether the process answers", has_content=False)},
        "/v2/health/ready": {"get": _operation("Whether every model answers", (400,), has_content=False)},
        "/v2/models/stats": {"get": _operation("What was counted of every version")},
        "/v2/repository/index": {"post": _operation("Every version and its state", _OF_BODIES, array=True)},
    }
    for path, parameters in (("/v2/models/{name}", [name]), ("/v2/models/{name}/versions/{version}", [name, version])):
        operations = {
            "": {"get": _operation("The tensors that a model takes and gives", _OF_MODELS)},
            "/ready": {"get": _operation("Whether a model answers", (400, 404), has_content=False)},
            "/config": {"get": _operation("A model as Triton's configuration describes it", _OF_MODELS)},
            "/stats": {"get": _operation("What was counted of a model", _OF_MODELS)},
            "/infer": {"post": _infer()},
        }
        for below, operation in operations.items():
            found[path + below] = {
                method: {**described, "parameters": parameters} for method, described in operation.items()
            }
    return found


def _infer() -> dict[str, Any]:
    inputs = "\n".join(
        f"- `{tensor}` ({sent.datatype}, {sent.n_axes} {'axes' if sent.n_axes > 1 else 'axis'}): {sent.description}"
        for tensor, sent in INPUTS.items()
    )
    statuses = {problems.PROTOCOL_STATUS.get(status, status) for status in problems.STATUS.values()} - {405, 500}
    operation = _operation("Any outputs of a model for cells", tuple(sorted(statuses)))
    operation["description"] = (
        f"The inputs:\n\n{inputs}\n\nThe outputs are those of the model's metadata; all, where none is named. Tensors may follow the JSON as "
        "bytes, in requests and in answers (the extension binary_tensor_data)."
    )
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}}},
    }
    operation["responses"]["200"]["content"] = {
        "application/json": {"schema": {"$ref": "#/components/schemas/InferenceResponse"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    return operation


def _operation(
    summary: str, statuses: tuple[int, ...] = (), *, has_content: bool = True, array: bool = False
) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": summary}
    if has_content:
        answer["content"] = {"application/json": {"schema": {"type": "array" if array else "object"}}}
    error = {"description": "The protocol's error", "content": {"application/json": {"schema": ERROR}}}
    return {
        "summary": summary,
        "tags": ["open inference protocol"],
        "parameters": [],
        "responses": {"200": answer, **{str(status): error for status in sorted({*statuses, 405, 500})}},
    }
