"""For each way of asking a server: requests prepared beforehand, and a function that sends one and gives the latent that came back.

What a call takes is what a client waits for: sending the prepared request, reading the whole answer, and making it an array. Making the
request is not in it, for no side: cells as Arrow for ours, dense matrices in the form that each other server takes fastest.
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.raw_http import Answer, Connection, request
from benchmarks.servers.served import Served
from benchmarks.workload import Cells

ARROW = "application/vnd.apache.arrow.stream"
Latent = NDArray[np.float32]
Ask = Callable[[int], Latent]
"""Asks for the piece of that number, modulo the number of pieces."""

Connect = Callable[[int], Ask]
"""Makes an asker with a connection of its own to a port; to be called in the thread that will ask."""


def plain(requests: Sequence[bytes], read: Callable[[bytes], Latent]) -> Connect:
    """Askers over plain HTTP."""

    def connect(port: int) -> Ask:
        connection = Connection(port)

        def ask(turn: int) -> Latent:
            answer = connection.ask(requests[turn % len(requests)])
            check(answer)
            return read(bytes(answer.content))

        return ask

    return connect


def check(answer: Answer) -> None:
    """Raise a RuntimeError where an answer is none."""
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {bytes(answer.content[:2000]).decode(errors='replace')}")


def cellserve(cells: Cells, served: Served, size: int, n_pieces: int) -> Connect:
    """Ours, with the bodies of service.client."""
    path = f"/v1/embed?model={served.name}"
    return plain([request(path, body, ARROW) for body in cells.arrow(size, n_pieces)], read_arrow)


def read_arrow(content: bytes) -> Latent:
    """The latent of an Arrow answer."""
    with pa.ipc.open_stream(content) as reader:
        batch = reader.read_next_batch()
    column = batch.column("latent")
    latent: Latent = column.flatten().to_numpy().reshape(len(column), -1)
    return latent


def triton(cells: Cells, _served: Served, size: int, n_pieces: int) -> Connect:
    """Triton by its own client, with binary tensors."""
    import tritonclient.http as triton_client

    inputs = [_triton_input(dense) for dense in cells.dense(size, n_pieces)]
    wanted = [triton_client.InferRequestedOutput("latent", binary_data=True)]

    def connect(port: int) -> Ask:
        client = triton_client.InferenceServerClient(f"127.0.0.1:{port}")

        def ask(turn: int) -> Latent:
            latent: Latent = client.infer("encode", inputs[turn % n_pieces], outputs=wanted).as_numpy("latent")
            return latent

        return ask

    return connect


def triton_plain(cells: Cells, served: Served, size: int, n_pieces: int) -> Connect:
    """Triton by the same client as ours, with the very bytes that its own client would send."""
    import tritonclient.http as triton_client

    wanted = [triton_client.InferRequestedOutput("latent", binary_data=True)]
    requests = []
    for dense in cells.dense(size, n_pieces):
        body, n_head = triton_client.InferenceServerClient.generate_request_body(_triton_input(dense), outputs=wanted)
        head = {"Inference_Header_Content_Length": str(n_head)}
        requests.append(request("/v2/models/encode/infer", body, "application/octet-stream", **head))

    def read(content: bytes) -> Latent:
        # The answer is JSON with the tensor's bytes after it; one output, so these are the last.
        return np.frombuffer(content[-4 * size * served.n_latent :], np.float32).reshape(size, -1)

    return plain(requests, read)


def _triton_input(dense: NDArray[np.float32]) -> list[Any]:
    import tritonclient.http as triton_client

    counts = triton_client.InferInput("counts", list(dense.shape), "FP32")
    counts.set_data_from_numpy(dense, binary_data=True)
    return [counts]


def mlserver_json(cells: Cells, _served: Served, size: int, n_pieces: int) -> Connect:
    """MLServer with numbers in JSON."""
    return plain(
        [_mlserver_request(dense, "FP32", dense.astype(int).ravel().tolist()) for dense in cells.dense(size, n_pieces)],
        lambda content: np.array(orjson.loads(content)["outputs"][0]["data"], np.float32).reshape(size, -1),
    )


def mlserver_base64(cells: Cells, _served: Served, size: int, n_pieces: int) -> Connect:
    """MLServer with the matrix's bytes in base64."""

    def read(content: bytes) -> Latent:
        return np.frombuffer(base64.b64decode(orjson.loads(content)["outputs"][0]["data"][0]), np.float32).reshape(
            size, -1
        )

    pieces = cells.dense(size, n_pieces)
    return plain([_mlserver_request(dense, "BYTES", [base64.b64encode(dense).decode()]) for dense in pieces], read)


def _mlserver_request(dense: NDArray[np.float32], datatype: str, data: list[Any]) -> bytes:
    shape = list(dense.shape) if datatype == "FP32" else [1, 1]
    tensor = {"name": "counts", "shape": shape, "datatype": datatype, "data": data}
    return request("/v2/models/encode/infer", orjson.dumps({"inputs": [tensor]}), "application/json")


def bentoml_json(cells: Cells, _served: Served, size: int, n_pieces: int) -> Connect:
    """BentoML with nested lists in JSON."""
    contents = (orjson.dumps({"counts": dense.astype(int).tolist()}) for dense in cells.dense(size, n_pieces))
    return plain(
        [request("/encode", content, "application/json") for content in contents],
        lambda content: np.array(orjson.loads(content), np.float32),
    )


def bentoml_npy(cells: Cells, _served: Served, size: int, n_pieces: int) -> Connect:
    """BentoML with matrices in .npy."""
    requests = []
    for dense in cells.dense(size, n_pieces):
        sink = io.BytesIO()
        np.save(sink, dense)
        requests.append(request("/encode_npy", sink.getvalue(), "application/x-npy"))
    return plain(requests, lambda content: np.load(io.BytesIO(content)))


SIDES: dict[str, tuple[str, Callable[[Cells, Served, int, int], Connect]]] = {
    "cellserve": ("cellserve", cellserve),
    "Triton, tritonclient": ("triton", triton),
    "Triton, plain HTTP": ("triton", triton_plain),
    "MLServer, base64": ("mlserver", mlserver_base64),
    "MLServer, JSON": ("mlserver", mlserver_json),
    "BentoML, .npy": ("plain_bentoml", bentoml_npy),
    "BentoML, JSON": ("plain_bentoml", bentoml_json),
}
"""What is compared: the server (see start.SERVERS) and how it is asked."""
