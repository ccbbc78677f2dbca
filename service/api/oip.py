"""The Open Inference Protocol v2 but for inference: what the server and its models are, whether they are ready, what was counted."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api import problems
from service.api.catalogue import model_of_path
from service.api.health import why_not_ready
from service.api.oip_signature import outputs_of
from service.api.openapi import VERSION
from service.api.state import State, state
from service.cells.formats.tensor_cells import INPUTS
from service.contract import strict_json
from service.errors import EmptyBody, MalformedBody, ModelNotReady, NotReady
from service.inference.model import Model

PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "statistics")


async def server_metadata(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
    """What serves, and which extensions it speaks."""
    return JSONResponse({"name": "cellserve", "version": VERSION, "extensions": EXTENSIONS})


async def live(request: Request) -> Response:  # noqa: ARG001 - an endpoint's signature
    """200 as long as the process answers."""
    return Response()


async def ready(request: Request) -> Response:
    """200 where /readyz is; else 400, as the protocol has it, with the reason."""
    app = state(request)
    reason = why_not_ready(app)
    return Response() if reason is None else _not_ready(NotReady(reason=reason, models=app.models.states()))


async def model_ready(request: Request) -> Response:
    """200 where the model answers; 400 where it is not ready, 404 where there is none."""
    try:
        await model_of_path(request)
    except ModelNotReady as error:
        return _not_ready(error)
    return Response()


def _not_ready(error: NotReady | ModelNotReady) -> Response:
    answer = problems.protocol_error(error)
    answer.status_code = 400
    return answer


async def model_metadata(request: Request) -> Response:
    """Names, types and shapes of a model's tensors; -1 stands for any number."""
    app, model = state(request), await model_of_path(request)
    name = model.manifest.name
    return JSONResponse(
        {
            "name": name,
            "versions": [found.version for found in app.models.loaded() if found.name == name],
            "platform": PLATFORM,
            "inputs": [
                {"name": tensor, "datatype": sent.datatype, "shape": _input_shape(tensor, model)}
                for tensor, sent in INPUTS.items()
            ],
            "outputs": [
                {"name": tensor, "datatype": given.datatype, "shape": [-1, *given.widths]}
                for tensor, given in (await outputs_of(app, model)).items()
            ],
        }
    )


async def config(request: Request) -> Response:
    """The model as Triton's configuration would describe it. Requests are batched by rows, so `max_batch_size` is 0: shapes are whole."""
    app, model = state(request), await model_of_path(request)
    return JSONResponse(
        {
            "name": model.manifest.name,
            "platform": PLATFORM,
            "backend": "onnxruntime",
            "version_policy": {"all": {}},
            "max_batch_size": 0,
            "input": [
                {
                    "name": tensor,
                    "data_type": f"TYPE_{_config_type(sent.datatype)}",
                    "dims": _input_shape(tensor, model),
                    # Tools that make up their own inputs send those that must be there: dense counts in the model's order.
                    "optional": tensor != "counts",
                }
                for tensor, sent in INPUTS.items()
            ],
            "output": [
                {"name": tensor, "data_type": f"TYPE_{_config_type(given.datatype)}", "dims": [-1, *given.widths]}
                for tensor, given in (await outputs_of(app, model)).items()
            ],
            "parameters": {"version": {"string_value": model.manifest.version}},
        }
    )


def _config_type(datatype: str) -> str:
    return "STRING" if datatype == "BYTES" else datatype


def _input_shape(tensor: str, model: Model) -> list[int]:
    """As a client sends it that names no genes."""
    return [-1, model.manifest.genes.n_genes] if tensor == "counts" else [-1] * INPUTS[tensor].n_axes


async def statistics(request: Request) -> Response:
    """What was counted of one version, or of all versions of a model where none is named."""
    app, model = state(request), await model_of_path(request)
    if "version" in request.path_params:
        return JSONResponse({"model_stats": [_statistics(app, model)]})
    versions = [found for model_id, found in app.models.loaded().items() if model_id.name == model.manifest.name]
    return JSONResponse({"model_stats": [_statistics(app, found) for found in versions]})


async def all_statistics(request: Request) -> Response:
    """What was counted of every version that is loaded."""
    app = state(request)
    return JSONResponse({"model_stats": [_statistics(app, model) for model in app.models.loaded().values()]})


def _statistics(app: State, model: Model) -> dict[str, Any]:
    """Requests and cells are those of this protocol; runs are the model's, which cells of other requests share."""
    counted, runs = app.statistics.of(model.id), app.batcher.runs[model.id]
    nothing = {"count": 0, "ns": 0}
    return {
        "name": model.manifest.name,
        "version": model.manifest.version,
        "last_inference": counted.last_inference_ms,
        "inference_count": counted.n_cells,
        "execution_count": sum(run.n_runs for run in runs.values()),
        "inference_stats": {**counted.as_dict(), "cache_hit": nothing, "cache_miss": nothing},
        "batch_stats": [
            {
                "batch_size": n_rows,
                "compute_input": nothing,
                "compute_infer": {"count": run.n_runs, "ns": round(run.seconds * 1e9)},
                "compute_output": nothing,
            }
            for n_rows, run in sorted(runs.items())
        ],
    }


async def index(request: Request) -> Response:
    """Every version and its state; of those that are ready only, where the body says {"ready": true}."""
    app = state(request)
    try:
        async with app.intake.body(request) as body:
            only_ready = _only_ready(body)
    except EmptyBody:
        only_ready = False
    states = app.models.states()
    entries = [_entry(model_id.name, model_id.version, states[str(model_id)]) for model_id in app.models.listing.ids()]
    return JSONResponse([entry for entry in entries if entry["state"] == "READY" or not only_ready])


def _only_ready(body: bytes) -> bool:
    try:
        asked = strict_json.loads(body)
    except ValueError as error:
        raise MalformedBody(problem=f"The body is not valid JSON: {error}.") from None
    if not isinstance(asked, Mapping) or not isinstance(asked.get("ready", False), bool):
        raise MalformedBody(problem='The body must be empty or an object such as {"ready": true}.')
    return bool(asked.get("ready", False))


def _entry(name: str, version: str, said: str) -> dict[str, str]:
    state_of = {"ready": "READY", "loading": "LOADING"}.get(said, "UNAVAILABLE")
    return {"name": name, "version": version, "state": state_of, "reason": said if state_of == "UNAVAILABLE" else ""}
