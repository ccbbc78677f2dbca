"""The Open Inference Protocol as NVIDIA's own client speaks it, unmodified, with a real server of the shipped model."""

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anndata as ad
import httpx
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from service.contract.artifact import Artifact
from tests.builders import arrow_body
from tests.end_to_end.conftest import VERSION, many
from tests.end_to_end.server import ROOT, Server, running_server

ARROW = {"Content-Type": "application/vnd.apache.arrow.stream"}


@contextlib.contextmanager
def triton_client(url: str) -> Iterator[InferenceServerClient]:
    client = InferenceServerClient(url.removeprefix("http://"))
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def client(server: Server) -> Iterator[InferenceServerClient]:
    with triton_client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def dense(cells: ad.AnnData) -> NDArray[np.float32]:
    """Real counts in the model's order, shape (n_cells, n_genes)."""
    return sp.csr_matrix(cells.X).toarray().astype(np.float32)


def given(name: str, array: Any, datatype: str = "FP32", is_binary: bool = True) -> InferInput:
    array = np.ascontiguousarray(array)
    tensor = InferInput(name, list(array.shape), datatype)
    return tensor.set_data_from_numpy(array, binary_data=is_binary)


def names(words: Any) -> NDArray[np.object_]:
    return np.array(list(words), dtype=np.object_)


def columns_of(server: Server, task: str, cells: ad.AnnData) -> pa.Table:
    """What POST /v1/<task> answers for the same cells."""
    body = arrow_body(sp.csr_matrix(cells.X), tuple(cells.var_names))
    answer = httpx.post(f"{server.url}/v1/{task}", content=body, headers=ARROW)
    assert answer.status_code == 200, answer.text
    return pa.ipc.open_stream(answer.content).read_all()


def bits(table: pa.Table, column: str) -> bytes:
    values = table.column(column).combine_chunks()
    return (values.flatten() if pa.types.is_fixed_size_list(values.type) else values).to_numpy().tobytes()


def counted(client: InferenceServerClient) -> dict[str, Any]:
    return client.get_inference_statistics("pbmc", VERSION)["model_stats"][0]


def test_server(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata["name"] == "cellserve"
    assert "binary_tensor_data" in metadata["extensions"]
    ready = {"name": "pbmc", "version": VERSION, "state": "READY", "reason": ""}
    assert client.get_model_repository_index() == [ready]


def test_readiness_of_models(client: InferenceServerClient) -> None:
    assert client.is_model_ready("pbmc")
    assert client.is_model_ready("pbmc", VERSION)
    assert client.is_model_ready("pbmc", "default")
    assert not client.is_model_ready("pbmc", "99")
    assert not client.is_model_ready("nope")


def test_metadata_and_config(client: InferenceServerClient, shipped: Artifact) -> None:
    """What a client must know to send cells and to read answers."""
    manifest = shipped.manifest
    metadata, config = client.get_model_metadata("pbmc"), client.get_model_config("pbmc", VERSION)
    n_genes, n_classes = manifest.genes.n_genes, len(manifest.labels[0].classes)

    assert (metadata["name"], metadata["versions"]) == ("pbmc", [VERSION])
    assert metadata["inputs"][0] == {"name": "counts", "datatype": "FP32", "shape": [-1, n_genes]}
    assert metadata["inputs"][1] == {"name": "genes", "datatype": "BYTES", "shape": [-1]}
    outputs = {output["name"]: (output["datatype"], output["shape"]) for output in metadata["outputs"]}
    assert (
        outputs.items()
        >= {
            "latent": ("FP32", [-1, manifest.n_latent]),
            "is_empty": ("BOOL", [-1]),
            "expression": ("FP32", [-1, n_genes]),
            "predicted_labels": ("BYTES", [-1]),
            "conf_score": ("FP32", [-1]),
            "probabilities": ("FP32", [-1, n_classes]),
            "neighbours": ("BYTES", [-1, 15]),
            "top_genes": ("BYTES", [-1, 20]),
        }.items()
    )
    assert (config["name"], config["max_batch_size"]) == ("pbmc", 0)
    assert [sent["name"] for sent in config["input"] if not sent["optional"]] == ["counts"]


@pytest.mark.parametrize("is_binary_in", [True, False], ids=["bytes-in", "json-in"])
@pytest.mark.parametrize("is_binary_out", [True, False], ids=["bytes-out", "json-out"])
def test_same_bits(
    server: Server,
    client: InferenceServerClient,
    cells: ad.AnnData,
    dense: NDArray[np.float32],
    is_binary_in: bool,
    is_binary_out: bool,
) -> None:
    """Latent, labels, probabilities and expression have the bits that the tasks' own routes give, in all four forms."""
    wanted = ("latent", "predicted_labels", "conf_score", "probabilities", "expression", "is_empty")
    outputs = [InferRequestedOutput(name, binary_data=is_binary_out) for name in wanted]
    result = client.infer("pbmc", [given("counts", dense, is_binary=is_binary_in)], outputs=outputs, request_id="r-1")
    embed, annotate, reconstruct = (columns_of(server, task, cells) for task in ("embed", "annotate", "reconstruct"))

    assert result.get_response()["id"] == "r-1"
    assert [output["name"] for output in result.get_response()["outputs"]] == list(wanted)
    assert ("parameters" in result.get_output("latent")) is is_binary_out
    assert result.as_numpy("latent").tobytes() == bits(embed, "latent")
    assert result.as_numpy("conf_score").tobytes() == bits(annotate, "conf_score")
    assert result.as_numpy("probabilities").tobytes() == bits(annotate, "probabilities")
    assert result.as_numpy("expression").tobytes() == bits(reconstruct, "expression")
    labels = [word.decode() if isinstance(word, bytes) else word for word in result.as_numpy("predicted_labels")]
    assert labels == annotate.column("predicted_labels").to_pylist()
    assert len(set(labels)) > 2
    assert not result.as_numpy("is_empty").any()


def latent(client: InferenceServerClient, *inputs: InferInput, **more: Any) -> bytes:
    outputs = [InferRequestedOutput("latent")]
    found: InferResult = client.infer("pbmc", list(inputs), outputs=outputs, **more)
    return found.as_numpy("latent").tobytes()


def test_every_form_of_cells(
    server: Server, client: InferenceServerClient, cells: ad.AnnData, dense: NDArray[np.float32], shipped: Artifact
) -> None:
    """Genes by id or symbol in any order, sparse or dense, compressed or not, whole or one by one: the same bits."""
    wanted = bits(columns_of(server, "embed", cells), "latent")
    order = np.random.default_rng(2).permutation(dense.shape[1])
    ids, symbols = names(shipped.genes.gene_id), names(shipped.genes.gene_symbol)
    matrix = sp.csr_matrix(dense)
    sparse = [
        given("data", matrix.data),
        given("indices", matrix.indices.astype(np.int64), "INT64"),
        given("indptr", matrix.indptr.astype(np.int64), "INT64"),
    ]

    assert latent(client, given("counts", dense)) == wanted
    for genes in (ids, symbols):
        for is_binary in (True, False):
            sent = given("genes", genes[order], "BYTES", is_binary)
            assert latent(client, given("counts", dense[:, order]), sent) == wanted
    assert latent(client, *sparse) == wanted
    assert latent(client, *sparse, given("genes", symbols, "BYTES")) == wanted
    for algorithm in ("gzip", "deflate"):
        assert latent(client, given("counts", dense), request_compression_algorithm=algorithm) == wanted
    # The length of the JSON changes where its bytes begin: between words of memory, too.
    alone = [latent(client, given("counts", dense[row : row + 1]), request_id="x" * row) for row in range(len(dense))]
    assert b"".join(alone) == wanted


def test_the_example_of_the_docs(server: Server) -> None:
    """What docs/oip.md shows runs as it stands there."""
    lines = (ROOT / "docs/oip.md").read_text().splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    found: dict[str, Any] = {}
    exec(code.replace("localhost:3000", server.url.removeprefix("http://")), found)

    assert found["answer"].as_numpy("latent").shape == (2, 32)
    assert found["answer"].as_numpy("predicted_labels").tolist() == [b"Unknown", b"Unknown"]
    found["client"].close()


def test_all_outputs_as_bytes(client: InferenceServerClient, dense: NDArray[np.float32]) -> None:
    """A client that names no output gets all of them, and asks for bytes by a parameter of the request."""
    result = client.infer("pbmc", [given("counts", dense[:2])])
    metadata = client.get_model_metadata("pbmc")

    assert [output["name"] for output in result.get_response()["outputs"]] == [
        output["name"] for output in metadata["outputs"]
    ]
    assert all("binary_data_size" in output["parameters"] for output in result.get_response()["outputs"])
    assert result.as_numpy("expression").shape == (2, dense.shape[1])


def test_parameters(client: InferenceServerClient, dense: NDArray[np.float32]) -> None:
    """Options of tasks are parameters."""
    asked = {"genes": "LYZ,CD3D", "library_size": 10_000}
    outputs = [InferRequestedOutput("expression")]
    result = client.infer("pbmc", [given("counts", dense)], outputs=outputs, parameters=asked)

    assert result.as_numpy("expression").shape == (len(dense), 2)
    assert result.get_response()["parameters"]["gene_overlap"] == 1.0


def test_many_cells(client: InferenceServerClient, cells: ad.AnnData) -> None:
    """A request of many runs: thousands of cells, tens of megabytes."""
    counts = many(cells, 3_000).toarray().astype(np.float32)
    some = latent(client, given("counts", counts[2_000:2_010]))

    assert latent(client, given("counts", counts))[2_000 * len(some) // 10 :].startswith(some)


def test_async_infer(client: InferenceServerClient, server: Server, dense: NDArray[np.float32]) -> None:
    """Many requests in flight over several connections."""
    wanted = latent(client, given("counts", dense))
    several = InferenceServerClient(server.url.removeprefix("http://"), concurrency=8)
    outputs = [InferRequestedOutput("latent")]
    requests = [several.async_infer("pbmc", [given("counts", dense)], outputs=outputs) for _ in range(40)]
    found = [request.get_result().as_numpy("latent").tobytes() for request in requests]
    several.close()

    assert found == [wanted] * 40


def held(server: Server) -> float:
    text = httpx.get(server.url + "/metrics").text
    return float(re.search(r"^cellserve_body_bytes_in_flight (\S+)$", text, re.MULTILINE)[1])


def test_a_client_that_does_not_read(server: Server, cells: ad.AnnData) -> None:
    """An answer counts as held until it is read, so that many of them cannot add up unseen; a client that leaves lets go of it."""
    counts = many(cells, 3_000).toarray().astype("<f4")
    header = (
        b'{"inputs": [{"name": "counts", "datatype": "FP32", "shape": [3000, 2000], "parameters": {"binary_data_size": 24000000}}],'
        b' "outputs": [{"name": "expression", "parameters": {"binary_data": true}}]}'
    )
    head = (
        f"POST /v2/models/pbmc/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(header) + counts.nbytes}\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\n\r\n"
    )
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        connection.sendall(head.encode() + header + counts.tobytes())
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        time.sleep(1)
        assert held(server) == 24_000_000
    deadline = time.monotonic() + 10
    while held(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held(server) == 0


class Wrong:
    """A request that must be refused."""

    def __init__(self, words: str, *inputs: InferInput, status: str = "400", **more: Any) -> None:
        self.words, self.inputs, self.status, self.more = words, inputs, status, more


def relabelled(tensor: InferInput, **attributes: Any) -> InferInput:
    """A tensor that says of itself what is not so; the client checks only what it is given by its own calls."""
    for name, value in attributes.items():
        setattr(tensor, f"_{name}", value)
    return tensor


ONES = np.ones((2, 2000), np.float32)
WRONG = {
    "unknown model": Wrong("no model 'nope'", given("counts", ONES), status="404", model_name="nope"),
    "unknown version": Wrong("no model 'pbmc@9'", given("counts", ONES), status="404", model_version="9"),
    "unknown input": Wrong("unexpected inference input 'INPUT0' for model 'pbmc'", given("INPUT0", ONES)),
    "unknown output": Wrong(
        "unexpected inference output 'OUTPUT0' for model 'pbmc'",
        given("counts", ONES),
        outputs=[InferRequestedOutput("OUTPUT0")],
    ),
    "no counts": Wrong("expected the input 'counts'", given("genes", names(["A"]), "BYTES")),
    "float64": Wrong(
        "data-type is 'FP64', but model 'pbmc' expects 'FP32'", given("counts", ONES.astype(np.float64), "FP64")
    ),
    "int32": Wrong(
        "data-type is 'INT32', but model 'pbmc' expects 'FP32'", given("counts", ONES.astype("i4"), "INT32")
    ),
    "too few columns": Wrong(r"Expected [-1, 2000], got [2, 1999]", given("counts", ONES[:, 1:])),
    "one axis": Wrong("unexpected shape for input 'counts'", given("counts", ONES[0])),
    "three axes": Wrong("unexpected shape for input 'counts'", given("counts", ONES[None])),
    "more in shape": Wrong(
        "must have 24,000 bytes, but 16,000 arrived", relabelled(given("counts", ONES), shape=[3, 2000])
    ),
    "less in shape": Wrong(
        "must have 8,000 bytes, but 16,000 arrived", relabelled(given("counts", ONES), shape=[1, 2000])
    ),
    "huge shape": Wrong(
        "holds 1,000,000,000,000,000 cells", relabelled(given("counts", ONES), shape=[10**15, 2000]), status="413"
    ),
    "huge allowed shape": Wrong(
        "must have 800,000,000 bytes, but 16,000 arrived", relabelled(given("counts", ONES), shape=[100_000, 2000])
    ),
    "negative shape": Wrong("inputs.0.shape.0", relabelled(given("counts", ONES), shape=[-1, 2000])),
    "no cells": Wrong("no cells", given("counts", ONES[:0])),
    "bytes missing": Wrong(
        "16,000 bytes are left", relabelled(given("counts", ONES), parameters={"binary_data_size": 16_004})
    ),
    "bytes left over": Wrong(
        "4 bytes after", relabelled(given("counts", ONES), parameters={"binary_data_size": 15_996})
    ),
    "not counts": Wrong("fractional", given("counts", ONES / 2)),
    "json of not counts": Wrong("negative", given("counts", -ONES, is_binary=False)),
    "classification": Wrong(
        "classification", given("counts", ONES), outputs=[InferRequestedOutput("probabilities", class_count=2)]
    ),
    "shared memory": Wrong(
        "shared memory", relabelled(given("counts", ONES), parameters={"shared_memory_region": "r"})
    ),
    "sequence": Wrong("sequence_", given("counts", ONES), sequence_id=4, sequence_start=True),
    "priority": Wrong("priority", given("counts", ONES), priority=1),
    "parameter": Wrong("'colour'", given("counts", ONES), parameters={"colour": "red"}),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_errors(client: InferenceServerClient, wrong: Wrong) -> None:
    """The client raises with the status and the sentence of the server, which goes on to serve."""
    with pytest.raises(InferenceServerException, match=re.escape(wrong.words)) as raised:
        client.infer(**{"model_name": "pbmc", "inputs": list(wrong.inputs), **wrong.more})

    assert raised.value.status() == wrong.status
    assert client.is_server_ready()


def test_errors_of_other_calls(client: InferenceServerClient) -> None:
    """What is not spoken is an error that the client understands."""
    for call in (
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        lambda: client.load_model("pbmc"),
        lambda: client.get_model_metadata("nope"),
        lambda: client.get_model_config("nope"),
        lambda: client.get_inference_statistics("nope"),
    ):
        with pytest.raises(InferenceServerException) as raised:
            call()
        assert raised.value.status() == "404"


def test_statistics(client: InferenceServerClient, dense: NDArray[np.float32]) -> None:
    """Each request and each of its cells is counted once, and refusals as failures."""
    before = counted(client)
    for _ in range(3):
        latent(client, given("counts", dense))
    with pytest.raises(InferenceServerException):
        client.infer("pbmc", [given("counts", dense[:, 1:])])
    after = counted(client)

    def more(stage: str, what: str = "count") -> int:
        return after["inference_stats"][stage][what] - before["inference_stats"][stage][what]

    assert after["inference_count"] - before["inference_count"] == 3 * len(dense)
    assert after["execution_count"] - before["execution_count"] == 3
    assert (more("success"), more("fail"), more("queue"), more("compute_infer")) == (3, 1, 3, 3)
    assert more("success", "ns") >= more("compute_infer", "ns") > 0
    assert client.get_inference_statistics()["model_stats"] == [after]


def test_limits_and_versions(tiny_store: Path) -> None:
    """Too many cells are 413; a body and an answer that do not fit beside what is held are 429; what fits is answered."""
    limits = {
        "CELLSERVE_MAX_CELLS": "50",
        "CELLSERVE_MAX_BODY_BYTES": "20000",
        "CELLSERVE_MAX_BODY_BYTES_IN_FLIGHT": "20000",
    }
    cells = np.ones((51, 40), np.float32)
    with running_server(tiny_store, **limits) as url, triton_client(url) as client:
        assert client.get_model_metadata("tiny", "2")["versions"] == ["1", "2"]
        for n_cells, status in ((51, "413"), (50, "429")):
            with pytest.raises(InferenceServerException) as raised:
                client.infer("tiny", [given("counts", cells[:n_cells])])
            assert raised.value.status() == status
        for version in ("", "1", "2", "default"):
            result = client.infer("tiny", [given("counts", cells[:20])], model_version=version)
            assert result.get_response()["model_version"] == ("2" if version == "2" else "1")
            assert result.as_numpy("latent").shape == (20, 5)
