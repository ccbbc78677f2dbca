"""An encoder whose first layer multiplies 8-bit integers, for processors that have instructions for it.

The first layer is nearly all of an encoder's arithmetic. Its input and weights are rounded to 8 bits with one scale for all cells, from
training cells (Jacob et al. 2018, arXiv:1712.05877), so that a cell's values depend on no other cell. Sums of integers are exact in any
order. Weights use 7 of the 8 bits: with 8, sums of two products overflow on x86 processors without VNNI, and answers would differ there.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from training.onnx_graph import Precision, strip

MINIBATCH = 512
ENCODERS = frozenset({"encode", "encode_values"})
N_RANGE = 2_048
"""Cells from which the range of what is rounded to 8 bits is taken."""


class NothingToQuantise(Exception):
    """A graph has no matrix product with fixed weights."""


class _Cells(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Training cells, minibatch by minibatch."""

    def __init__(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        n_cells = len(next(iter(inputs.values())))
        self._minibatches: Iterator[dict[str, NDArray[np.generic]]] = (
            {name: array[start : start + MINIBATCH] for name, array in inputs.items()}
            for start in range(0, n_cells, MINIBATCH)
        )

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        """The next minibatch, None after the last."""
        return next(self._minibatches, None)


def variant_name(name: str, precision: Precision) -> str:
    """A model's name; in another precision its answers are others, so that nobody shall get them under the same name."""
    return name if precision == "float32" else f"{name}-{precision}"


def precision_of(graph: str, precision: Precision) -> Precision:
    """Of a graph of a model in some precision: encoders alone are quantised."""
    return precision if graph in ENCODERS else "float32"


def quantise_encoders(contents: Mapping[str, bytes], inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, bytes]:
    """ONNX files by name, of which those of the encoder multiply in 8 bits.

    Args:
        contents: ONNX bytes in float32, by file name.
        inputs: of N_RANGE cells, by name.

    Raises:
        NothingToQuantise: the encoder has no layer to quantise.
    """

    def given(content: bytes) -> dict[str, NDArray[np.generic]]:
        return {tensor.name: inputs[tensor.name] for tensor in onnx.load_from_string(content).graph.input}

    encoders = {f"{name}.onnx" for name in ENCODERS}
    return {
        file: quantise(content, given(content)) if file in encoders else content for file, content in contents.items()
    }


def quantise(content: bytes, inputs: Mapping[str, NDArray[np.generic]]) -> bytes:
    """A graph with its largest matrix product in 8 bits.

    Args:
        content: ONNX bytes in float32.
        inputs: of training cells, by name, from which the range of the product's input is taken.

    Raises:
        NothingToQuantise: no product has weights of its own.
    """
    graph = onnx.load_from_string(content).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    products = {
        node.name: sizes[node.input[1]]
        for node in graph.node
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in sizes
    }
    if not products:
        raise NothingToQuantise("The graph multiplies no matrix of weights, so there is nothing to do in 8 bits.")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(content)
        quantize_static(
            source,
            target,
            _Cells(inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[max(products, key=products.__getitem__)],
        )
        model = onnx.load(target)
    strip(model)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)
