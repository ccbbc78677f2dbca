"""The training cells that travel with a model, their votes, the picture, and the spread of counts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from service.contract import artifact
from service.inference import TASKS, neighbours
from service.inference import model as serving
from service.inference.model import Model
from service.inference.session import Runtime
from tests.training.tiny import register, tiny_config
from training import export as exporting
from training import reference_space, run
from training.data.splits import TRAIN
from training.evaluation.annotation import query_sets
from training.exported import exported_graphs
from training.projection import fit_projection, measure_projection


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[run.Run]:
    """A finished run that asks for a picture."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        config = tiny_config(export={"n_golden": 4, "n_parity": 24})
        yield run.fit(config, tmp_path_factory.mktemp("reference") / "run", show_progress=False)


@pytest.fixture(scope="module")
def model(made: run.Run, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """It, exported and loaded."""
    return serving.load(artifact.read(exporting.export(made, tmp_path_factory.mktemp("store"))), Runtime())


def exported(made: run.Run, root: Path, **wanted: object) -> Model:
    """It, exported with other reference cells and no picture."""
    export = made.config.export.model_copy(
        update={"reference": made.config.export.reference.model_copy(update={"project": False, **wanted})}
    )
    other = run.Run(
        **{**vars(made), "config": made.config.model_copy(update={"export": export})},
    )
    return serving.load(artifact.read(exporting.export(other, root)), Runtime())


def test_they_are_the_training_cells_where_the_served_encoder_puts_them(made: run.Run, model: Model) -> None:
    """All of them, with names, batches, labels and the latents that embed answers."""
    assert model.reference is not None
    cells, train = model.reference.cells, made.prepared.train
    positions = made.split.positions(made.reference, TRAIN)
    assert cells.cell_ids == tuple(made.reference.obs_names[positions])
    assert [made.prepared.batches[code] for code in cells.batch] == made.reference.obs["dataset"].iloc[
        positions
    ].tolist()
    classes = model.manifest.labels[0].classes
    assert [classes[code] for code in cells.labels["cell_type"]] == made.reference.obs["cell_type"].iloc[
        positions
    ].tolist()
    assert cells.latent.tobytes() == model.encode(train.counts).tobytes()
    assert model.manifest.reference.n_cells == model.manifest.reference.n_training_cells == len(train)


def test_a_mapped_training_cell_is_its_own_nearest(made: run.Run, model: Model) -> None:
    """Through the task, at distance 0."""
    found = TASKS["map"].run(model, made.prepared.train.counts[:20], TASKS["map"].options())
    assert found["neighbours"].codes[:, 0].tolist() == list(range(20))
    assert (found["neighbour_distances"].values[:, 0] == 0).all()


def test_votes_are_those_of_scikit_learn(made: run.Run, model: Model) -> None:
    """Plain votes of the same number of neighbours."""
    assert model.reference is not None
    cells, how = model.reference.cells, model.manifest.reference.vote.model_copy(update={"weighting": "uniform"})
    latent = model.encode(made.test_cells.X)
    shares = neighbours.shares(how, cells.labels, {"cell_type": 3}, *model.reference.search(latent, how.n_neighbours))
    classifier = KNeighborsClassifier(how.n_neighbours, algorithm="brute").fit(cells.latent, cells.labels["cell_type"])
    np.testing.assert_allclose(shares["cell_type"], classifier.predict_proba(latent), atol=1e-6)


def test_figures_of_the_vote(made: run.Run, model: Model) -> None:
    """On test cells, of each set and without the reference cells of the query's own batch; they stand in the card."""
    metrics = model.manifest.metrics
    positions = query_sets(made)["held_out_tiny_a"]
    latent = model.encode(made.reference[positions, made.prepared.var.index].X)
    found = neighbours.vote(model, latent)["cell_type"].argmax(axis=1)
    classes = np.array(model.manifest.labels[0].classes)
    assert metrics["accuracy_vote_held_out_tiny_a"] == pytest.approx(
        (classes[found] == made.reference.obs["cell_type"].iloc[positions]).mean()
    )
    assert 0 < metrics["accuracy_vote_other_batches"] < 1
    assert "`cell_type`: the classifier" in model.card or "`cell_type`: the vote" in model.card


def test_the_better_answers() -> None:
    """The vote only where it is better by more than the margin and than chance."""
    truth = np.arange(300) % 3
    right = np.eye(3, dtype=np.float32)[truth]
    few_wrong, many_wrong = right.copy(), right.copy()
    few_wrong[:3], many_wrong[:60] = np.roll(right[:3], 1, axis=1), np.roll(right[:60], 1, axis=1)
    assert reference_space._is_better(truth, right, many_wrong)
    assert not reference_space._is_better(truth, right, few_wrong)
    assert not reference_space._is_better(truth, many_wrong, right)
    assert not reference_space._is_better(truth, right, right)


def test_fewer_cells() -> None:
    """Small classes are kept whole, large ones give the same number each; the seed decides which."""
    labels = np.repeat([-1, 0, 1, 2], [40, 500, 7, 900])[:, None]
    chosen = reference_space.choose(labels, 207, seed=0)
    assert (np.diff(chosen) > 0).all()
    assert dict(zip(*np.unique(labels[chosen], return_counts=True), strict=True)) == {-1: 40, 0: 80, 1: 7, 2: 80}
    assert chosen.tolist() == reference_space.choose(labels, 207, seed=0).tolist()
    assert chosen.tolist() != reference_space.choose(labels, 207, seed=1).tolist()
    assert len(reference_space.choose(labels, 2000, seed=0)) == len(labels)
    assert len(reference_space.choose(np.zeros((50, 0), np.int64), 20, seed=0)) == 20


def test_fewer_or_none_in_the_artifact(made: run.Run, tmp_path: Path) -> None:
    """As many as the configuration asks for; without any the model does not offer map."""
    some, none = (exported(made, tmp_path / str(number), max_cells=number) for number in (30, 0))
    assert some.manifest.reference.n_cells == len(some.reference) == 30
    assert some.manifest.reference.n_training_cells == len(made.prepared.train)
    assert "project" not in some.manifest.graphs
    assert "drawn from the" in some.card
    assert (none.manifest.reference, none.reference) == (None, None)
    assert not TASKS["map"].offered_by(none)
    assert "Reference cells" not in none.card


def test_the_picture(made: run.Run, model: Model) -> None:
    """The network gives back the coordinates of the UMAP; both come out again the same, and torch and the runtime agree on them."""
    assert model.reference is not None
    cells = model.reference.cells
    again, projector = fit_projection(cells.latent, made.config.seed)
    assert cells.umap.tobytes() == again.tobytes()
    projected = model.project(cells.latent)
    np.testing.assert_allclose(projected, projector(torch.from_numpy(cells.latent)).detach(), atol=1e-4)
    spread = np.square(cells.umap - cells.umap.mean(axis=0)).sum()
    assert np.square(projected - cells.umap).sum() / spread < 0.2
    assert model.manifest.parity.outputs["project/umap"].absolute < 1e-4
    assert 0.5 < model.manifest.metrics["umap_trustworthiness_reference"] <= 1
    assert "trustworthiness" in model.card


def test_what_is_measured_of_a_picture() -> None:
    """A picture that is the latent itself keeps every neighbourhood; a shuffled one keeps none."""
    random = np.random.default_rng(0)
    plane = random.uniform(-1, 1, (600, 2)).astype(np.float32)
    held_out = random.uniform(-0.9, 0.9, (100, 2)).astype(np.float32)

    def itself(latent: torch.Tensor) -> torch.Tensor:
        return latent

    def shuffled(latent: torch.Tensor) -> torch.Tensor:
        return latent.flip(0)

    good = measure_projection(itself, plane, plane, held_out, seed=0)
    bad = measure_projection(shuffled, plane, plane, held_out, seed=0)
    assert good["umap_trustworthiness_reference"] > 0.99
    assert good["umap_trustworthiness_held_out"] > 0.99
    assert good["umap_distance_held_out"] < 0.06
    assert good["umap_distance_held_out"] == pytest.approx(good["umap_distance_reference"], abs=0.03)
    assert bad["umap_trustworthiness_held_out"] < 0.7
    assert bad["umap_distance_held_out"] > 0.5


@pytest.mark.parametrize("likelihood", ["negative_binomial", "zero_inflated_poisson"])
def test_spread_is_that_of_draws_from_the_likelihood(tiny_sets: None, tmp_path: Path, likelihood: str) -> None:
    """Through the serving code: the standard deviation of 20,000 draws, within what chance allows."""
    config = tiny_config(
        model={"hidden": [16], "n_latent": 4, "likelihood": likelihood},
        export={"n_golden": 4, "n_parity": 24, "reference": {"max_cells": 0}},
    )
    made = run.fit(config, tmp_path / "run", show_progress=False)
    model = serving.load(artifact.read(exporting.export(made, tmp_path / "store")), Runtime())
    options = TASKS["reconstruct"].read_options({"spread": "true", "batch": "tiny_a"}, model)
    counts = made.test_cells.X[:3]
    found = TASKS["reconstruct"].run(model, counts, options)["expression_sd"].values
    torch.manual_seed(0)
    library = torch.from_numpy(np.asarray(counts.sum(axis=1)).ravel())
    with torch.no_grad():
        latent = torch.from_numpy(model.encode(counts))
        draws = made.family.distribution(latent, library, torch.zeros(3, dtype=torch.int64)).sample(
            torch.Size([20_000])
        )
    np.testing.assert_allclose(found, draws.std(dim=0), rtol=0.15, atol=0.01)
    np.testing.assert_allclose(found.mean(), draws.std(dim=0).mean(), rtol=0.02)


def test_no_spread_where_the_likelihood_is_not_one_of_counts(tiny_sets: None, tmp_path: Path) -> None:
    """Values on a logarithmic scale have no deviation in counts, and none is made up."""
    config = tiny_config(family="autoencoder", model={"hidden": [16], "n_latent": 4, "likelihood": "mse"})
    made = run.fit(config, tmp_path / "run", show_progress=False)
    assert exported_graphs(made.family, has_spread=True)["decode"].outputs == ("expression",)
