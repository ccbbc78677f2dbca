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

from training.onnx_graph import strip

MINIBATCH = 512


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
