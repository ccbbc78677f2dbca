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
from service.contract.reference_cells import dump_cells

N_GENES, N_LATENT = 40, 5
CLASSES = ("B", "T", "NK")
SUBTYPES, PARENTS = ("B", "CD4 T", "CD8 T", "bright NK", "dim NK"), ("B", "T", "T", "NK", "NK")
THRESHOLD = 0.4
"""Below it the calibrated tiny model says Unknown."""

OPSET = 18


def _spread(low: float, high: float) -> dict[str, Any]:
    names = ("0.05", "0.25", "0.5", "0.75", "0.95")
    return {"mean": (low + high) / 2, "quantiles": dict(zip(names, np.linspace(low, high, 5).tolist(), strict=True))}


PROFILE: dict[str, Any] = {
    "n_cells": 100,
    "library_size": _spread(20, 100),
    "labels": {
        "cell_type": {
            "shares": {"B": 0.75, "T": 0.25},
            "conf_score": _spread(0.4, 0.9),
            "entropy": _spread(0.1, 0.8),
            "n_held_out": 20,
        }
    },
}
"""A manifest's `profile` of a reference without NK cells."""


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
    n_genes: int = N_GENES,
    seed: int = 0,
    has_protein: bool = False,
    has_steps: bool = False,
    is_calibrated: bool = False,
    is_explained: bool = True,
) -> dict[str, bytes]:
    """encode, decode, classify and project as ONNX bytes: log1p, a linear layer and ReLU; softmax times library; softmax; linear.

    The variance of decode is that of Poisson counts, mean for mean.

    With `has_protein` decode also gives PROTEINS, and knows the batch 2, which is the average of 0 and 1. With `has_steps` there are also
    transform and encode_values, the logarithm of single counts and what encode does after it. With `is_calibrated` classify divides CLASSES
    into SUBTYPES, and map_score is a sigmoid of the latent's sum. With `is_explained` there is also explain, its gradient written by hand.
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
            helper.make_node("Identity", ["expression"], ["expression_variance"]),
        ],
        [value("latent", "n", N_LATENT), value("library", "n"), value("batch", "n", dtype=TensorProto.INT64)],
        [value("expression", "n", n_genes), value("expression_variance", "n", n_genes)],
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
    project = (
        [helper.make_node("MatMul", ["latent", "w"], ["umap"])],
        [value("latent", "n", N_LATENT)],
        [value("umap", "n", 2)],
        [weight("w", N_LATENT, 2)],
    )
    made = {"encode": encode, "decode": decode, "classify": classify, "project": project}
    if is_explained:
        made["explain"] = explain
    if has_steps:
        made["transform"] = (
            [helper.make_node("Add", ["count", "one"], ["shifted"]), helper.make_node("Log", ["shifted"], ["value"])],
            [value("count", "n")],
            [value("value", "n")],
            [one],
        )
        made["encode_values"] = (
            [helper.make_node("Gemm", ["values", "w", "b"], ["latent"])],
            [value("values", "n", n_genes)],
            encode[2],
            encode[3][1:],
        )
    if is_calibrated:
        share = np.array([[1.0, 0.75, 0.25, 0.5, 0.5]], dtype=np.float32)
        classify[0].append(helper.make_node("Gather", ["probabilities_cell_type", "above"], ["parent"], axis=1))
        classify[0].append(helper.make_node("Mul", ["parent", "share"], ["probabilities_cell_subtype"]))
        classify[2].append(value("probabilities_cell_subtype", "n", len(SUBTYPES)))
        classify[3].append(numpy_helper.from_array(np.array([CLASSES.index(name) for name in PARENTS]), "above"))
        classify[3].append(numpy_helper.from_array(share, "share"))
        made["map_score"] = (
            [
                # Not by ReduceSum, whose bits depend on where in memory a row of five begins.
                helper.make_node("MatMul", ["latent", "ones"], ["sum"]),
                helper.make_node("Squeeze", ["sum", "axes"], ["flat"]),
                helper.make_node("Sigmoid", ["flat"], ["mapping_score"]),
            ],
            [value("latent", "n", N_LATENT)],
            [value("mapping_score", "n")],
            [
                numpy_helper.from_array(np.ones((N_LATENT, 1), dtype=np.float32), "ones"),
                numpy_helper.from_array(np.array([1]), "axes"),
            ],
        )
    models = {}
    for name, (nodes, inputs, outputs, initializers) in made.items():
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
    has_steps: bool = False,
    has_reference: bool = True,
    is_calibrated: bool = False,
    is_explained: bool = True,
    **changes: Any,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest as a plain document, and the contents of the files; `changes` replace members of the manifest.

    Without a reference the model lacks what came with it: the reference cells, project, and the variance of decode.
    """
    table = gene_table(n_genes)
    # The gradient written by hand knows one label level.
    is_explained = is_explained and not is_calibrated
    onnx_bytes = graphs(n_genes, seed, has_protein, has_steps, is_calibrated, is_explained)
    if not has_reference:
        del onnx_bytes["project"]
        decode = onnx.load_from_string(onnx_bytes["decode"])
        for member in (decode.graph.output, decode.graph.node):
            del member[[getattr(part, "name", "") or part.output[0] for part in member].index("expression_variance")]
        onnx_bytes["decode"] = decode.SerializeToString()
    golden: dict[str, Any] = {"encode/counts": counts(9, n_genes, seed=1).toarray()}
    golden["encode/counts"][-1] = 0
    if has_steps:
        golden["transform/count"] = golden["encode/counts"].max(axis=1)
        golden["encode_values/values"] = np.log1p(golden["encode/counts"])
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
        if "latent" in {info.name for info in session.get_inputs()}:
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
    reference = None
    if has_reference:
        reference, files = reference_cells(onnx_bytes["encode"], n_genes)
        contents |= files
    more = calibrated_parts(contents) if is_calibrated else {}
    if is_explained:
        table_bytes = io.BytesIO()
        np.savez_compressed(table_bytes, **impact_table(n_genes).arrays())
        contents["reference/impact.npz"] = table_bytes.getvalue()
        source = {"name": "sets.gmt", "sha256": "0" * 64, "licence": "CC0", "n_sets": len(SETS)}
        about = {"file": "reference/impact.npz", "n_cells": 9, "min_set_genes": 5, "max_set_genes": 500}
        more["impact"] = {**about, "gene_sets": [source]}
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
        **({"reference": reference} if reference else {}),
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
        **more,
        **changes,
    }
    return document, contents


N_REFERENCE = 23


def reference_cells(encode: bytes, n_genes: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest's `reference` and its files: seeded cells of both batches and all classes, the last without a label."""
    session = ort.InferenceSession(encode, providers=["CPUExecutionProvider"])
    latent = session.run(["latent"], {"counts": counts(N_REFERENCE, n_genes, seed=7).toarray()})[0]
    random = np.random.default_rng(7)
    arrays = {"latent": latent, "umap": random.standard_normal((N_REFERENCE, 2)).astype(np.float32)}
    files = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[f"reference/{name}.npy"] = buffer.getvalue()
    labels = [CLASSES[code] for code in random.integers(0, len(CLASSES), N_REFERENCE - 1)]
    files["reference/cells.tsv"] = dump_cells(
        tuple(f"set/{number}" for number in range(N_REFERENCE)),
        tuple(("one", "two")[number % 2] for number in range(N_REFERENCE)),
        {"cell_type": (*labels, "")},
    )
    return {
        "latent": "reference/latent.npy",
        "cells": "reference/cells.tsv",
        "umap": "reference/umap.npy",
        "n_cells": N_REFERENCE,
        "n_training_cells": N_REFERENCE,
        "vote": {"n_neighbours": 7, "weighting": "distance", "answers": {"cell_type": "classifier"}},
    }, files


def calibrated_parts(contents: dict[str, bytes]) -> dict[str, Any]:
    """Members of the manifest of a calibrated model; its calibration scores are added to `contents`.

    B has 30 scores of its own (0.00 to 0.29), T 10 and NK none, so that both share those of all.
    """
    scores = {
        "cell_type/scores": np.concatenate([np.arange(30) / 100, np.arange(10) / 10]),
        "cell_type/classes": np.repeat([0, 1], [30, 10]).astype(np.int32),
        "cell_subtype/scores": np.linspace(0, 0.9, 10),
        "cell_subtype/classes": np.arange(10, dtype=np.int32) % len(SUBTYPES),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **scores)
    contents["reference/conformal.npz"] = buffer.getvalue()
    reliability = {
        "log_loss": 0.5,
        "expected_calibration_error": 0.1,
        "bins": [{"n_cells": 40, "confidence": 0.9, "accuracy": 0.8}],
    }
    level = {
        "method": "temperature",
        "parameters": {"weight": [1.5]},
        "cells": "validation",
        "n_cells": 40,
        "candidates": {"none": 0.6, "temperature": 0.5},
        "before": reliability,
        "after": reliability,
    }
    left_out = {"name": "NK", "n_known": 9, "n_unknown": 9, "auroc": {"energy": 0.9}, "detected": 0.5, "rejected": 0.05}
    return {
        "labels": [
            {"name": "cell_type", "classes": list(CLASSES), "ontology_ids": ["CL:0000236", None, "CL:0000623"]},
            {
                "name": "cell_subtype",
                "classes": list(SUBTYPES),
                "ontology_ids": [None] * len(SUBTYPES),
                "parent": "cell_type",
                "parents": list(PARENTS),
            },
        ],
        "calibration": {"cell_type": level},
        "conformal": {
            "min_class": 20,
            "n_cells": {"cell_type": 40, "cell_subtype": 10},
            "sizes": [{"score": "lac", "level": "cell_type", "asked": 0.9, "coverage": 0.91, "mean_size": 1.2}],
        },
        "unknown": {
            "score": "energy",
            "threshold": THRESHOLD,
            "level": "cell_type",
            "share_of_epochs": 0.5,
            "cells": "validation",
            "n_cells": 40,
            "mean_auroc": {"energy": 0.9},
            "left_out": [left_out],
        },
    }


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
