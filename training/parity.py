"""What is served beside what was trained: ONNX Runtime in float32 against torch in float64."""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from service.contract.manifest import Difference
from service.inference.session import Session
from training.families.family import Graph
from training.onnx_graph import Precision

Arrays = dict[str, NDArray[np.generic]]

ABSOLUTE = {"latent": 1e-4, "probabilities": 1e-5}
"""Largest absolute difference that is allowed, by the first word of the output's name."""

RELATIVE = 1e-4
"""For all other outputs: largest absolute difference as a share of the output's largest value."""

ABSOLUTE_INT8, RELATIVE_INT8 = {"probabilities": 0.1}, 0.1
"""The same where the first layer is multiplied in 8 bits."""

FLOOR = 1e-3
"""Relative differences are taken to at least this size: a tiny difference of a tiny value would look large."""


class OutsideTolerance(Exception):
    """An exported graph gives other numbers than the network that was trained."""


def run_torch(graphs: Mapping[str, Graph], inputs: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """Every output of every graph in float64, keyed `<graph>/<tensor>`.

    Args:
        graphs: encode first; their modules are copied, not changed.
        inputs: counts, library and batch of the cells, and what else is given; the latent is what encode gives.
    """
    # In one copy, so that what modules share stays shared.
    graphs = copy.deepcopy(dict(graphs))
    for graph in graphs.values():
        graph.module.double().eval()
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    outputs: Arrays = {}
    with torch.no_grad():
        for name, graph in graphs.items():
            values = graph.module(*(tensors[tensor] for tensor in graph.inputs))
            values = values if isinstance(values, tuple) else (values,)
            found = dict(zip(graph.outputs, values, strict=True))
            tensors |= found
            outputs |= {f"{name}/{tensor}": value.numpy() for tensor, value in found.items()}
    return outputs


def run_sessions(sessions: Mapping[str, Session], graphs: Mapping[str, tuple[str, ...]], inputs: Arrays) -> Arrays:
    """Inputs and outputs of every graph as ONNX Runtime gives them, keyed `<graph>/<tensor>`.

    Args:
        sessions: by graph, encode first.
        graphs: names of the inputs by graph.
        inputs: counts, library and batch of the cells, and what `with_values` adds.
    """
    known, result = dict(inputs), {}
    for name, session in sessions.items():
        given = {tensor: known[tensor] for tensor in graphs[name]}
        found = session.run(given)
        known |= found
        result |= {f"{name}/{tensor}": array for tensor, array in {**given, **found}.items()}
    return result


def tolerance(output: str, values: NDArray[np.generic], precision: Precision = "float32") -> float:
    """Largest absolute difference that is allowed for an output."""
    kind = output.rpartition("/")[2].split("_")[0]
    absolute, relative = (ABSOLUTE, RELATIVE) if precision == "float32" else (ABSOLUTE_INT8, RELATIVE_INT8)
    return absolute.get(kind) or relative * float(np.abs(values).max())


def compare(served: Arrays, trained: Arrays, precision: Precision = "float32") -> dict[str, Difference]:
    """Largest differences by output, keyed `<graph>/<tensor>`.

    Raises:
        OutsideTolerance: with the output, the difference and the tolerance.
    """
    differences = {}
    for name, values in trained.items():
        difference = np.abs(served[name].astype(np.float64) - values)
        sizes = np.abs(values)
        allowed = tolerance(name, values, precision)
        largest = float(difference.max())
        # NaN must not pass as "not larger than".
        if not largest <= allowed:
            raise OutsideTolerance(
                f"{name} differs by {largest:.3g} between ONNX Runtime and torch in float64; {allowed:.3g} is allowed. "
                "Nothing was exported."
            )
        relative = float((difference / np.maximum(sizes, FLOOR)).max())
        differences[name] = Difference(absolute=largest, relative=relative, tolerance=allowed)
    return differences
