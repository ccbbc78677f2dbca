"""The graph explain: the gradient that autograd takes of the family itself, whatever the family and its settings."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from service.contract import artifact
from service.inference import TASKS
from service.inference import model as serving
from service.inference.session import Runtime, Session
from tests.training.families.test_families import N_GENES, build
from training import run
from training.explanation import INPUTS, NAME, OUTPUTS, Explain, example_inputs, log_odds
from training.families import FAMILIES
from training.families.family import Graph
from training.onnx_graph import signature, to_onnx

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    (
        "vae",
        {
            "layer_norm": True,
            "activation": "leaky_relu",
            "classifier_hidden": (6,),
            "input": "log_counts",
            "scale": False,
        },
    ),
    ("autoencoder", {"activation": "softplus", "latent_activation": "softplus", "batch_norm": True, "clip": 1e6}),
    ("atlas_vae", {"encoder": "tabnet", "encode_library": True}),
    ("gmvae", {"input": "binary", "scale": False}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_gradients_are_autograds(name: str, settings: dict[str, Any]) -> None:
    """Within 1e-4 of the largest, in ONNX Runtime, against torch.autograd.functional.jacobian in float64 of the family's own graphs."""
    family = build(name, **settings).eval()
    graph = Graph(Explain(family, torch.linspace(0.1, 2, N_GENES)), INPUTS, OUTPUTS, takes_gradient=True)
    counts = torch.poisson(torch.full((24, N_GENES), 2.0), generator=torch.Generator().manual_seed(1)).numpy()
    inputs = {"counts": counts}
    inputs |= example_inputs(graph, inputs)
    inputs["position"][:] = 1
    content = to_onnx(graph, {key: torch.from_numpy(array[:2]) for key, array in inputs.items()})
    found = Session(content, signature(content, "explain.onnx"), Runtime(), "explain.onnx").run(inputs)
    family.double()
    graphs = family.graphs()
    start = family.transform(torch.zeros(1, N_GENES, dtype=torch.float64))
    mean = torch.linspace(0.1, 2, N_GENES).double()
    expected = np.empty_like(counts, dtype=np.float64)
    for row, (cell, direction) in enumerate(zip(counts, inputs["direction"], strict=True)):
        raw = torch.from_numpy(cell)[None].double()
        values = family.transform(raw)

        def explained(given: torch.Tensor, raw: torch.Tensor = raw, direction: Any = direction) -> torch.Tensor:
            # The family's own graphs, with its transform given: probabilities become log-odds from scratch.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(family.transform, "forward", lambda counts: given)
                latent = graphs["encode"].module(raw)
                asked = {"latent": latent, "counts": raw}[graphs["classify"].inputs[0]]
                classes = graphs["classify"].module(asked)
            odds = [torch.log(p / (1 - p)) for p in (classes if isinstance(classes, tuple) else (classes,))]
            return torch.cat([latent, *odds], dim=1)[0] @ torch.from_numpy(direction).double()

        gradient = torch.autograd.functional.jacobian(explained, values)[0]
        baseline = mean if inputs["baseline"][row] else start[0]
        expected[row] = (gradient * (values[0] - baseline)).numpy()
    np.testing.assert_allclose(found["attribution"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3


def test_weights_are_kept_once() -> None:
    """The way back uses the transposed weights of the way forth, and does not store them again."""
    family = build("vae").eval()
    graph = Graph(Explain(family, torch.zeros(N_GENES)), INPUTS, OUTPUTS, takes_gradient=True)
    example = {"counts": torch.ones(2, N_GENES), "direction": torch.ones(2, 7), "position": torch.ones(2)}
    model = onnx.load_from_string(to_onnx(graph, {**example, "baseline": torch.zeros(2)}))
    shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]

    assert shapes.count((12, N_GENES)) + shapes.count((N_GENES, 12)) == 1


def test_log_odds() -> None:
    """Of each class against all others together, whatever constant the scores carry; of one class alone it is the score."""
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(log_odds(torch.log(p) + 3), torch.log(p / (1 - p)))
    assert log_odds(torch.tensor([[2.0]])).tolist() == [[2.0]]


def test_sure_cells_are_explained_too() -> None:
    """Where a probability is 1 in float32 its log-odds are still finite and have a gradient."""
    scores = torch.tensor([[200.0, 0.0, -100.0]], requires_grad=True)
    odds = log_odds(scores)
    (gradient,) = torch.autograd.grad(odds[0, 0], scores)

    assert odds[0, 0].item() == pytest.approx(200.0)
    assert gradient[0].tolist() == pytest.approx([1.0, -1.0, 0.0])


def test_every_family_is_explained_as_it_is_served(family_run: tuple[run.Run, Path], exported: Path) -> None:
    """Sums within 1 % for labels and units, and a cell's bits are those that it has alone."""
    model = serving.load(artifact.read(exported), Runtime())
    counts = family_run[0].test_cells.X.tocsr()[:20]
    task = TASKS[NAME]
    for target in ({}, {"unit": "1", "baseline": "mean"}):
        options = task.read_options({**target, "top": "all"}, model)
        together = task.run(model, counts, options)
        assert together["completeness_error"].values.max() < 0.01
        for row in (0, 7, 19):
            alone = task.run(model, counts[row], options)
            assert alone["attribution"].values.tobytes() == together["attribution"].values[row].tobytes()
