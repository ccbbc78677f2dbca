"""ONNX files: a cell's bits do not depend on its place in a run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from training.families.family import Graph
from training.onnx_graph import to_onnx


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x)


def graph_of(function: Callable[[torch.Tensor], torch.Tensor]) -> Graph:
    return Graph(Of(function), ("x",), ("y",))


@pytest.mark.parametrize("shape", [(5,), (13,), (53,), (16,), (2003,), (13, 13)])
def test_sums_do_not_depend_on_the_place(shape: tuple[int, ...]) -> None:
    """ONNX Runtime's own sum of 13 numbers does: its vectors begin at aligned addresses."""
    content = to_onnx(graph_of(lambda x: x.sum(-1)), {"x": torch.zeros(2, *shape)})
    session = ort.InferenceSession(content)
    cells = np.exp(np.random.default_rng(0).normal(size=(64, *shape))).astype(np.float32)
    expected = session.run(None, {"x": cells})[0]

    assert np.allclose(expected, cells.sum(-1, dtype=np.float64), rtol=1e-6)
    for places in range(1, 64):
        moved = session.run(None, {"x": np.roll(cells, places, axis=0)})[0]
        assert (np.roll(moved, -places, axis=0) == expected).all()


def test_a_mean_is_refused() -> None:
    """Zeros would change it."""
    with pytest.raises(ValueError, match="ReduceMean over 13 columns"):
        to_onnx(graph_of(lambda x: x.mean(-1)), {"x": torch.zeros(2, 13)})
    assert to_onnx(graph_of(lambda x: x.mean(-1)), {"x": torch.zeros(2, 32)})


def test_no_graph_of_a_family_adds_up_other_rows(exported: Path) -> None:
    """Rows with a cell each that are added up have a multiple of 16 numbers."""
    n_sums = 0
    for path in exported.glob("*.onnx"):
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
        shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.input)}
        axes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            shape = shapes.get(node.input[0]) if node.op_type in ("ReduceSum", "ReduceMean") else None
            if shape is None or shape[0].dim_value or len(shape) - 1 not in axes[node.input[1]] % len(shape):
                continue
            n_sums += 1
            assert shape[-1].dim_value % 16 == 0, (path.name, node.name)
    assert n_sums
