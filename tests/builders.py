"""Small, seeded parts for tests: a whole artifact of a few kilobytes with real ONNX graphs, and cells for it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pyarrow as pa
import scipy.sparse as sp
from onnx import TensorProto, helper, numpy_helper

from service.contract import artifact
from service.contract.gene_table import GeneTable
from service.contract.impact import ImpactTable
from service.contract.manifest import Manifest

N_GENES, N_LATENT = 40, 5
CLASSES = ("B", "T", "NK")
OPSET = 18


def gene_table(n_genes: int = N_GENES) -> GeneTable:
    """ENSG00000000000… with the symbols G0, G1, …; the first gene also has an alias and an id with a dot in its symbol's place."""
    return GeneTable(
        gene_id=tuple(f"ENSG{number:011d}" for number in range(n_genes)),
        gene_symbol=tuple("RP11-885N19.6" if number == 3 else f"G{number}" for number in range(n_genes)),
        aliases=tuple((f"OLD{number}",) if number < 3 else () for number in range(n_genes)),
        encoder_weight=np.full(n_genes, 1 / n_genes, dtype=np.float32),
    )


def counts(n_cells: int, n_genes: int = N_GENES, seed: int = 0, density: float = 0.4) -> sp.csr_matrix:
    """Poisson counts, shape (n_cells, n_genes), float32; no cell is empty."""
    random = np.random.default_rng(seed)
    dense = random.poisson(3, (n_cells, n_genes)) * (random.random((n_cells, n_genes)) < density)
    dense[:, 0] += 1
    return sp.csr_matrix(dense.astype(np.float32))


PROTEINS = ("CD3", "CD19")


def graphs(
    n_genes: int = N_GENES, seed: int = 0, has_protein: bool = False, is_explained: bool = True
) -> dict[str, bytes]:
    """encode, decode and classify as ONNX bytes: log1p, a linear layer and ReLU; softmax times library; softmax.

    With `has_protein` decode also gives PROTEINS, and knows the batch 2, which is the average of 0 and 1. With `is_explained` there is also
    explain, its gradient written by hand.
    """
    random = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array((random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32), name)

    def value(name: str, *shape: Any, dtype: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, dtype, shape)

    one = numpy_helper.from_array(np.ones(1, dtype=np.float32), "one")
    encode = (
        [
            helper.make_node("Add", ["counts", "one"], ["shifted"]),
            helper.make_node("Log", ["shifted"], ["logged"]),
            helper.make_node("Gemm", ["logged", "w", "b"], ["latent"]),
        ],
        [value("counts", "n", n_genes)],
        [value("latent", "n", N_LATENT)],
        [one, weight("w", n_genes, N_LATENT), weight("b", N_LATENT)],
    )
    decode = (
        [
            helper.make_node("Gather", ["offsets", "batch"], ["offset"], axis=0),
            helper.make_node("MatMul", ["latent", "w"], ["product"]),
            helper.make_node("Add", ["product", "offset"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["share"], axis=-1),
            helper.make_node("Unsqueeze", ["library", "last"], ["column"]),
            helper.make_node("Mul", ["share", "column"], ["expression"]),
        ],
        [value("latent", "n", N_LATENT), value("library", "n"), value("batch", "n", dtype=TensorProto.INT64)],
        [value("expression", "n", n_genes)],
        [weight("w", N_LATENT, n_genes), weight("offsets", 2, n_genes), numpy_helper.from_array(np.array([1]), "last")],
    )
    if has_protein:
        offsets = numpy_helper.to_array(decode[3][1])
        decode[0].append(helper.make_node("MatMul", ["latent", "w_protein"], ["protein"]))
        decode[2].append(value("protein", "n", len(PROTEINS)))
        decode[3][1] = numpy_helper.from_array(np.vstack([offsets, offsets.mean(axis=0)]), "offsets")
        decode[3].append(weight("w_protein", N_LATENT, len(PROTEINS)))
    explain = (
        [
            *encode[0],
            helper.make_node("MatMul", ["latent", "w_class"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["p"], axis=-1),
            helper.make_node("Sub", ["one", "p"], ["rest"]),
            helper.make_node("Split", ["direction", "parts"], ["of_latent", "of_class"], axis=1),
            # d log-odds / d logits for weights of the classes: weight - p (sum of r - r) with r = weight / (1 - p)
            helper.make_node("Div", ["of_class", "rest"], ["r"]),
            helper.make_node("ReduceSum", ["r", "last"], ["sum_r"], keepdims=1),
            helper.make_node("Sub", ["sum_r", "r"], ["others"]),
            helper.make_node("Mul", ["p", "others"], ["taken"]),
            helper.make_node("Sub", ["of_class", "taken"], ["by_logits"]),
            helper.make_node("Gemm", ["by_logits", "w_class"], ["by_class"], transB=1),
            helper.make_node("Add", ["of_latent", "by_class"], ["by_latent"]),
            helper.make_node("Gemm", ["by_latent", "w"], ["gradient"], transB=1),
            helper.make_node("Mul", ["change", "gradient"], ["attribution"]),
            helper.make_node("Div", ["p", "rest"], ["odds"]),
            helper.make_node("Log", ["odds"], ["log_odds"]),
            helper.make_node("Concat", ["latent", "log_odds"], ["quantities"], axis=1),
            helper.make_node("Mul", ["quantities", "direction"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "last"], ["value"], keepdims=0),
        ],
        [
            value("counts", "n", n_genes),
            value("direction", "n", N_LATENT + len(CLASSES)),
            value("position", "n"),
            value("baseline", "n"),
        ],
        [value("attribution", "n", n_genes), value("value", "n")],
        [
            *encode[3],
            numpy_helper.from_array(np.array([N_LATENT, len(CLASSES)]), "parts"),
            numpy_helper.from_array(np.array([1]), "last"),
            numpy_helper.from_array(np.full(n_genes, 0.7, dtype=np.float32), "profile"),
        ],
    )
    # The path in place of the cell: from nothing, or from the mean profile, to the logarithm of 1 + counts.
    explain[0][2:3] = [
        helper.make_node("Unsqueeze", ["baseline", "last"], ["is_mean"]),
        helper.make_node("Mul", ["is_mean", "profile"], ["start"]),
        helper.make_node("Sub", ["logged", "start"], ["change"]),
        helper.make_node("Unsqueeze", ["position", "last"], ["place"]),
        helper.make_node("Mul", ["change", "place"], ["way"]),
        helper.make_node("Add", ["start", "way"], ["values"]),
        helper.make_node("Gemm", ["values", "w", "b"], ["latent"]),
    ]
    classify = (
        [
            helper.make_node("Gemm", ["latent", "w"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities_cell_type"], axis=-1),
        ],
        [value("latent", "n", N_LATENT)],
        [value("probabilities_cell_type", "n", len(CLASSES))],
        [weight("w", N_LATENT, len(CLASSES))],
    )
    explain[3].append(_renamed(classify[3][0], "w_class"))
    models = {}
    wanted = {
        "encode": encode,
        "decode": decode,
        "classify": classify,
        **({"explain": explain} if is_explained else {}),
    }
    for name, (nodes, inputs, outputs, initializers) in wanted.items():
        graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model)
        models[name] = model.SerializeToString()
    return models


def _renamed(tensor: Any, name: str) -> Any:
    return numpy_helper.from_array(numpy_helper.to_array(tensor), name)


SETS = ("SET_ONE", "SET_TWO")


def impact_table(n_genes: int = N_GENES) -> ImpactTable:
    """Seeded impacts of the genes and of SETS on five units and three classes."""
    random = np.random.default_rng(5)
    n_classes, n_rows = len(CLASSES), N_LATENT + len(CLASSES)

    def values(n_values: int, *shape: int) -> Any:
        return random.uniform(0.01, 1, (n_values, *shape)).astype(np.float32)

    return ImpactTable(
        impact=values(n_rows, n_genes),
        gradient=values(n_rows, n_genes) - np.float32(0.5),
        attribution=values(n_classes, n_genes) - np.float32(0.5),
        set_names=SETS,
        set_sizes=np.array([7, 9]),
        **{name: values(n_rows, len(SETS)) for name in ("set_impact", "set_p", "set_q")},
        **{name: values(n_classes, len(SETS)) for name in ("set_contrast", "set_contrast_p", "set_contrast_q")},
    )


def _tensors(infos: Any) -> list[dict[str, Any]]:
    dtypes = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    return [
        {
            "name": info.name,
            "dtype": dtypes[info.type],
            "shape": [axis if isinstance(axis, int) else "n" for axis in info.shape],
        }
        for info in infos
    ]


def parts(
    name: str = "tiny",
    version: str = "1",
    n_genes: int = N_GENES,
    seed: int = 0,
    has_protein: bool = False,
    is_explained: bool = True,
    **changes: Any,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest as a plain document, and the contents of the files; `changes` replace members of the manifest."""
    table = gene_table(n_genes)
    onnx_bytes = graphs(n_genes, seed, has_protein, is_explained)
    golden: dict[str, Any] = {"encode/counts": counts(9, n_genes, seed=1).toarray()}
    golden["encode/counts"][-1] = 0
    signature = {}
    for graph, content in onnx_bytes.items():
        session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        if graph == "decode":
            golden |= {"decode/library": golden["encode/counts"].sum(axis=1), "decode/batch": np.arange(9) % 2}
        if graph == "explain":
            shape = (9, N_LATENT + len(CLASSES))
            golden["explain/counts"] = golden["encode/counts"]
            golden["explain/direction"] = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
            golden["explain/position"] = np.linspace(0, 1, 9, dtype=np.float32)
            golden["explain/baseline"] = (np.arange(9) % 2).astype(np.float32)
        elif graph != "encode":
            golden[f"{graph}/latent"] = golden["encode/latent"]
        inputs = {info.name: golden[f"{graph}/{info.name}"] for info in session.get_inputs()}
        for info, output in zip(session.get_outputs(), session.run(None, inputs), strict=True):
            golden[f"{graph}/{info.name}"] = output
        signature[graph] = {
            "file": f"{graph}.onnx",
            "inputs": _tensors(session.get_inputs()),
            "outputs": _tensors(session.get_outputs()),
        }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **golden)
    contents = {
        **{f"{graph}.onnx": content for graph, content in onnx_bytes.items()},
        "genes.tsv": table.dump(),
        "golden.npz": buffer.getvalue(),
        "README.md": f"# {name}\n\nA model for tests.\n".encode(),
    }
    if is_explained:
        table_bytes = io.BytesIO()
        np.savez_compressed(table_bytes, **impact_table(n_genes).arrays())
        contents["reference/impact.npz"] = table_bytes.getvalue()
        source = {"name": "sets.gmt", "sha256": "0" * 64, "licence": "CC0", "n_sets": len(SETS)}
        about = {"file": "reference/impact.npz", "n_cells": 9, "min_set_genes": 5, "max_set_genes": 500}
        changes = {"impact": {**about, "gene_sets": [source]}, **changes}
    outputs = [f"{graph}/{tensor['name']}" for graph, entry in signature.items() for tensor in entry["outputs"]]
    document = {
        "schema_version": 1,
        "name": name,
        "version": version,
        "family": "made_for_tests",
        "summary": "A few kilobytes with the shape of a real model.",
        "licence": "Apache-2.0",
        "n_latent": N_LATENT,
        "genes": {
            "file": "genes.tsv",
            "n_genes": n_genes,
            "id_type": "ensembl",
            "species": "homo_sapiens",
            "digest": table.digest,
            "min_gene_overlap": 0.5,
        },
        "graphs": signature,
        "batch": {"names": ["one", "two"]},
        "labels": [{"name": "cell_type", "classes": list(CLASSES), "ontology_ids": ["CL:0000236", None, "CL:0000623"]}],
        "golden": {"file": "golden.npz", "tolerance": dict.fromkeys(outputs, 1e-4)},
        "parity": {
            "n_cells": 9,
            "outputs": {output: {"absolute": 0, "relative": 0, "tolerance": 1e-4} for output in outputs},
        },
        "provenance": {
            "created": "2026-01-01T00:00:00Z",
            "command": "tests/builders.py",
            "code_commit": "none",
            "data": [],
            "config": {},
            "seed": seed,
            "packages": {},
            "hardware": {},
        },
        "files": {file: entry.model_dump() for file, entry in artifact.describe(contents).items()},
        **changes,
    }
    return document, contents


def write_artifact(root: Path, **arguments: Any) -> Path:
    """Write a tiny artifact into the store `root`; arguments as of `parts`."""
    document, contents = parts(**arguments)
    return artifact.write(root, Manifest.model_validate(document), contents)


def write_mismatch(root: Path, **arguments: Any) -> Path:
    """Write a whole artifact whose golden latent is not what its graph gives: only running it shows that."""
    document, contents = parts(**arguments)
    golden = dict(np.load(io.BytesIO(contents["golden.npz"])))
    golden["encode/latent"] = golden["encode/latent"] + 1
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **golden)
    contents["golden.npz"] = buffer.getvalue()
    document["files"] = {file: entry.model_dump() for file, entry in artifact.describe(contents).items()}
    return artifact.write(root, Manifest.model_validate(document), contents)


def json_body(matrix: sp.csr_matrix, genes: tuple[str, ...], cell_ids: tuple[str, ...] | None = None) -> bytes:
    """A JSON body with one map per cell."""
    cells = [
        {genes[column]: float(count) for column, count in zip(row.indices, row.data, strict=True)} for row in matrix
    ]
    return json.dumps({"genes": genes, "cells": cells, **({"cell_ids": cell_ids} if cell_ids else {})}).encode()


def arrow_body(
    matrix: sp.csr_matrix,
    genes: tuple[str, ...],
    cell_ids: tuple[str, ...] | None = None,
    rows_per_batch: int = 1000,
    compression: str | None = None,
    count_type: pa.DataType | None = None,
) -> bytes:
    """An Arrow IPC stream."""
    columns = {
        "gene": pa.ListArray.from_arrays(pa.array(matrix.indptr, pa.int32()), pa.array(matrix.indices, pa.int32())),
        "count": pa.ListArray.from_arrays(
            pa.array(matrix.indptr, pa.int32()),
            pa.array(matrix.data.astype(np.float32)).cast(count_type or pa.float32()),
        ),
    }
    if cell_ids:
        columns["cell_id"] = pa.array(cell_ids, pa.string())
    table = pa.table(columns).replace_schema_metadata({"genes": json.dumps(genes)})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return sink.getvalue()
