"""A torch module as ONNX bytes that repeat exactly and say nothing about the machine that made them."""

import copy
import logging
import warnings
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from service.contract.manifest import Graph as Signature
from service.contract.manifest import Tensor
from training.families.family import Graph

OPSET = 18
"""ONNX operator set of all graphs. Stated here only; ONNX Runtime 1.14 and later run it."""

PRODUCER = "cellserve"
Precision = Literal["float32", "int8"]
_TRACED_CELLS = 10_007
_NEUTRAL = {"ReduceSum": 0.0, "ReduceLogSumExp": -np.inf}
"""What changes nothing among what is reduced."""

_VECTOR = 16
"""Numbers in the longest vectors that a CPU adds up at a time."""

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}


def to_onnx(graph: Graph, example: dict[str, torch.Tensor]) -> bytes:
    """Export a graph.

    Args:
        graph: the module and the names of its tensors.
        example: an input per name with two or more cells as first axis; the shapes of all other axes are fixed by it.

    Returns:
        A checked ONNX file whose only free axis is the first, "n".
    """
    arguments = tuple(example[name] for name in graph.inputs)
    module = _without_autograd(graph.module.eval(), arguments) if graph.takes_gradient else graph.module.eval()
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch 2.13's exporter looks at the leaves of its trees in a way that it has deprecated itself.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in arguments),
            verbose=False,
        )
    model = program.model_proto
    strip(model)
    if graph.takes_gradient:
        _share_transposed(model.graph)
    _align_sums(model)
    onnx.checker.check_model(model, full_check=True)
    # Deterministic, so that fields of map type come in one order.
    return model.SerializeToString(deterministic=True)


def signature(content: bytes, file: str, precision: Precision = "float32") -> Signature:
    """The manifest's entry for an ONNX file."""
    graph = onnx.load_from_string(content).graph
    return Signature(
        file=file,
        inputs=tuple(_tensor(value) for value in graph.input),
        outputs=tuple(_tensor(value) for value in graph.output),
        precision=precision,
    )


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in kind.shape.dim)
    return Tensor(name=value.name, dtype=_DTYPES[kind.elem_type], shape=shape)


def _without_autograd(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> nn.Module:
    """The module with its gradient as operators of its own, each of them one that the exporter knows."""
    module = copy.deepcopy(module).requires_grad_(False)
    table = core_aten_decompositions()
    # The tracer takes sizes that are equal for the same size, and no layer is this wide. Nothing is computed of these cells.
    cells = tuple(argument.new_zeros(_TRACED_CELLS, *argument.shape[1:]) for argument in arguments)
    trace = make_fx(module, decomposition_table=table, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    traced: nn.Module = trace(*cells)
    return traced.eval()


def _share_transposed(graph: onnx.GraphProto) -> None:
    """Keep one copy of weights that the graph uses both ways: forward, and transposed on the way back."""
    kept: dict[bytes, str] = {}
    nodes, initializers = [], []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        other = kept.get(array.T.tobytes()) if array.ndim == 2 and min(array.shape) > 1 else None
        if other is None:
            kept[array.tobytes()] = tensor.name
            initializers.append(tensor)
        else:
            nodes.append(
                helper.make_node("Transpose", [other], [tensor.name], f"Transpose_to_{tensor.name}", perm=[1, 0])
            )
    nodes.extend(graph.node)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)


def _align_sums(model: onnx.ModelProto) -> None:
    """Fill rows up with what changes nothing where their numbers are added up.

    ONNX Runtime adds whole vectors that begin at aligned addresses, and what stands before and after them by itself. Where a row's length
    is no multiple of a vector's, the order of the sum depends on where in the run the cell stands, and so does its last bit.

    Raises:
        ValueError: rows of such a length are added up by an operator for which nothing does that.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.input)}
    axes_of = {
        tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer if tensor.dims == [1]
    }
    nodes, initializers = [], []
    for node in model.graph.node:
        if not node.op_type.startswith("Reduce") or node.op_type in ("ReduceMax", "ReduceMin"):
            nodes.append(node)
            continue
        shape, axes = shapes[node.input[0]], axes_of[node.input[1]]
        n_more = -shape[-1].dim_value % _VECTOR
        # What has no cells in it stands in the same place whatever is asked.
        if shape[0].dim_value or not {-1, len(shape) - 1}.intersection(axes) or not n_more:
            nodes.append(node)
            continue
        if node.op_type not in _NEUTRAL:
            raise ValueError(f"{node.op_type} over {shape[-1].dim_value} columns: its bits depend on a cell's place")
        pads, filler, filled = (f"{node.name}_{part}" for part in ("pads", "filler", "filled"))
        ends = [0] * len(shape) + [0] * (len(shape) - 1) + [n_more]
        initializers.append(numpy_helper.from_array(np.array(ends, np.int64), pads))
        given = [node.input[0], pads]
        if _NEUTRAL[node.op_type]:
            initializers.append(numpy_helper.from_array(np.array(_NEUTRAL[node.op_type], np.float32), filler))
            given.append(filler)
        nodes.append(helper.make_node("Pad", given, [filled], f"Pad_of_{node.name}"))
        node.input[0] = filled
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter says about itself: versions, source lines, the names of modules."""
    model.producer_name, model.producer_version, model.doc_string, model.domain = PRODUCER, "", "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = PRODUCER, ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    for value in (*graph.input, *graph.output):
        # The exporter names the cells' axis once per input; they are one.
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    for i, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{i}"
