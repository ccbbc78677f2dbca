"""The shipped model: where in a run a cell stands leaves no trace in its bits, whatever the graph."""

from pathlib import Path

import numpy as np
import pytest

from service.contract import artifact
from service.contract.manifest import Tensor
from service.contract.store import Store
from service.inference.model import Model, load
from service.inference.session import SHAPES, Array, Runtime

N_CELLS = SHAPES[-1]
STORE = Store(Path(__file__).parents[3] / "models_store")


@pytest.fixture(scope="module")
def model() -> Model:
    return load(artifact.read(STORE.path(STORE.resolve("pbmc"))), Runtime())


def drawn(tensor: Tensor, model: Model, generator: np.random.Generator) -> Array:
    """Values that an input may have: golden cells drawn anew, batches, and else anything."""
    if tensor.name == "counts":
        rates = model.golden_counts.toarray()[np.arange(N_CELLS) % model.golden_counts.shape[0]]
        return generator.poisson(rates).astype(np.float32)
    shape = (N_CELLS, *(int(axis) for axis in tensor.shape[1:]))
    if tensor.dtype == "int64":
        return np.zeros(shape, np.int64)
    return (
        generator.gamma(2.0, 50.0, shape).astype(np.float32)
        if tensor.name in ("library", "count")
        else generator.normal(size=shape).astype(np.float32)
    )


@pytest.mark.parametrize(
    "name", [str(name) for name in artifact.read_manifest(STORE.path(STORE.resolve("pbmc"))).graphs]
)
def test_every_graph(model: Model, name: str) -> None:
    """More cells than the golden ones, which need not show it: another order of a sum changes the last bit of some only."""
    generator = np.random.default_rng(0)
    inputs = {tensor.name: drawn(tensor, model, generator) for tensor in model.manifest.graphs[name].inputs}
    expected = model.sessions[name].run(inputs)
    for places in (1, 2, 3, 5, 8, 13):
        moved = model.sessions[name].run({key: np.roll(array, places, axis=0) for key, array in inputs.items()})
        for output, values in moved.items():
            assert np.roll(values, -places, axis=0).tobytes() == expected[output].tobytes(), (output, places)
