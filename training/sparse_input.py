"""The encoder a second time, cut behind the step that is taken of counts that are not zero.

Four fifths of a cell's counts are zeros, and the logarithm of a zero costs as much as any other. Serving runs `transform` on the counts
that are there and `encode_values` on the matrix of what it gives; both are proved against `encode` when a model is loaded.
"""

import copy
from collections.abc import Mapping
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.families.family import Graph
from training.networks import InputTransform


class HasGraphs(Protocol):
    """A network that is exported: a family, or an imported one."""

    encodes_library: bool
    """Whether its encoder also sees the counts behind the transform."""

    def graphs(self) -> dict[str, Graph]:
        """Modules by the names of the manifest."""


class Value(nn.Module):
    """count (n,) and perhaps library (n,) → value (n,)."""

    def __init__(self, transform: InputTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, count: Tensor, library: Tensor | None = None) -> Tensor:
        """What single counts of cells with `library` counts become."""
        return self.transform.value(count, library)


class Finish(nn.Module):
    """Stands in the place of a transform of which `value` has been taken already."""

    def __init__(self, transform: InputTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, values: Tensor) -> Tensor:
        """Values (n, n_genes) to what the first layer is given."""
        return self.transform.finish(values)


def serving_graphs(network: HasGraphs) -> dict[str, Graph]:
    """The network's graphs, and `transform` and `encode_values` where its encoder begins with a transform that costs something."""
    graphs, transform = network.graphs(), _costly_transform(network)
    if transform is None:
        return graphs
    cut = copy.deepcopy(network)
    cast("nn.Module", cut).transform = Finish(transform)
    return {
        **graphs,
        "transform": Graph(Value(transform), transform.costly_of, ("value",)),
        "encode_values": Graph(cut.graphs()["encode"].module, ("values",), graphs["encode"].outputs),
    }


def with_values(network: HasGraphs, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Inputs of `encode` and others, of shape (n_cells, …), with those that `serving_graphs` adds.

    Args:
        network: as there.
        inputs: with `counts`, (n_cells, n_genes), and `library`, (n_cells,).

    Returns:
        Also `count`, the largest of each cell, (n_cells,), and `values`, (n_cells, n_genes).
    """
    transform = _costly_transform(network)
    if transform is None:
        return dict(inputs)
    counts = torch.from_numpy(np.asarray(inputs["counts"]))
    with torch.no_grad():
        values = transform.value(counts, counts.sum(dim=1, keepdim=True)).numpy()
    return {**inputs, "count": counts.amax(dim=1).numpy(), "values": values}


def _costly_transform(network: HasGraphs) -> InputTransform | None:
    transform = getattr(network, "transform", None)
    can_be_cut = isinstance(transform, InputTransform) and transform.costly_of and not network.encodes_library
    return transform if can_be_cut else None
