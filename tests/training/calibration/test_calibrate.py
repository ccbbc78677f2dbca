"""Calibrating a run: on cells that no gradient came from, into graphs that serve the same bits, and without a look at the test cells."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from service.contract import artifact
from service.contract.manifest import Graph as Signature
from service.inference import model as serving
from service.inference.annotate import AnnotateOptions
from service.inference.annotate import run as annotate
from service.inference.session import Runtime, Session
from tests.training.tiny import SETTINGS, TYPES, register, tiny_config
from training import cli, parity, run
from training import export as exporting
from training.calibration import calibrate as calibrating
from training.calibration import folds, sets, stored, unknown
from training.calibration.calibrate import CannotCalibrate, calibrate
from training.calibration.graphs import complete
from training.calibration.scores import SCORES, Percentile, Reference, over_rows, quantiles_of
from training.calibration.stored import Calibration, StaleCalibration, StoredScore
from training.config import Start
from training.data.prepared import LabelsContradict
from training.data.splits import CALIBRATION, TEST, TRAIN
from training.onnx_graph import signature, to_onnx

LEVELS: list[dict[str, Any]] = [
    {"name": "lineage", "column": "cell_type", "values": {"CD4 T": "T"}, "classes": {"B": None, "T": None, "NK": None}},
    {
        "name": "sublineage",
        "classes": {"B1": None, "B2": None, "T": None, "NK": None},
        "parent": "lineage",
        "parents": {"B1": "B", "B2": "B", "T": "T", "NK": "NK"},
    },
]


def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny sets with half of the B cells called otherwise in a column of their own."""
    register(monkeypatch)
    from training.data.readers import READERS

    for name in ("tiny_a", "tiny_b"):

        def reader(files: Any, inner: Any = READERS[name]) -> Any:
            cells = inner(files)
            is_first = np.arange(cells.n_obs) % 2 == 0
            kind = cells.obs["cell_type"].replace({"CD4 T": "T"})
            cells.obs["sublineage"] = kind.where(kind != "B", np.where(is_first, "B1", "B2"))
            return cells

        monkeypatch.setitem(READERS, name, reader)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[run.Run, Path, Path]:
    """A calibrated tiny run of two levels, its directory, and the exported version."""
    root = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as monkeypatch:
        halves(monkeypatch)
        config = tiny_config(labels=LEVELS, split={"test": 0.2, "validation": 0.1, "calibration": 0.3})
        made = run.fit(config, root / "run", show_progress=False)
        stored.write(root / "run", root / "run" / run.WEIGHTS, calibrate(made, share_of_epochs=0.4))
        again = run.load(root / "run")
        return again, root / "run", exporting.export(again, root / "store")


@pytest.fixture(scope="module")
def in_folds(tmp_path_factory: pytest.TempPathFactory) -> tuple[run.Run, Path, Path]:
    """The same without validation cells, calibrated in three folds."""
    root = tmp_path_factory.mktemp("in_folds")
    with pytest.MonkeyPatch.context() as monkeypatch:
        halves(monkeypatch)
        longer = {**SETTINGS["fit"], "max_epochs": 30}
        config = tiny_config(labels=LEVELS, split={"test": 0.2, "validation": 0}, fit=longer)
        made = run.fit(config, root / "run", show_progress=False)
        stored.write(root / "run", root / "run" / run.WEIGHTS, calibrate(made, share_of_epochs=0.4, n_folds=3))
        again = run.load(root / "run")
        return again, root / "run", exporting.export(again, root / "store")


@pytest.fixture(params=["calibrated", "in_folds"])
def either(request: pytest.FixtureRequest) -> tuple[run.Run, Path, Path]:
    """Of both ways."""
    found: tuple[run.Run, Path, Path] = request.getfixturevalue(request.param)
    return found


def test_what_is_served_is_what_was_calibrated(either: tuple[run.Run, Path, Path]) -> None:
    """Probabilities through the serving code are torch's in float64 within 1e-5, mapping scores within 1e-4, and levels agree."""
    made, _, version = either
    model = serving.load(artifact.read(version), Runtime())
    cells = made.test_cells
    inputs = {
        "counts": cells.X.toarray(),
        "library": cells.X.toarray().sum(axis=1),
        "batch": np.zeros(cells.n_obs, int),
    }
    levels = made.config.label_levels
    torch_says = parity.run_torch(complete(made.family.graphs(), levels, made.calibration), inputs)
    found = model.classify(cells.X)
    for level in levels:
        expected = torch_says[f"classify/probabilities_{level.name}"]
        np.testing.assert_allclose(found[level.name], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.mapping_score(cells.X), torch_says["map_score/mapping_score"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["sublineage"][:, :2].sum(axis=1), found["lineage"][:, 0], rtol=1e-5)
    assert (model.mapping_score(cells.X) >= 0).all()
    assert (model.mapping_score(cells.X) <= 1).all()


def test_the_graph_does_what_the_figures_are_of(calibrated: tuple[run.Run, Path, Path]) -> None:
    """The network's own probabilities, mapped by numpy, are what the exported graph gives."""
    from training.calibration import probabilities as fitting

    made, _, version = calibrated
    assert made.calibration is not None
    model = serving.load(artifact.read(version), Runtime())
    cells = made.prepared.validation
    levels, raw = made.config.label_levels, calibrating.network_probabilities(made, cells)
    group = fitting.groups(levels)
    maps = {level.name: fitting.Map.identity(len(level.classes)) for level in levels} | made.calibration.maps
    mapped = {name: fitting.apply_map(maps[name], raw[name], group[name]) for name in raw}
    for name, expected in fitting.compose(levels, mapped).items():
        np.testing.assert_allclose(model.classify(cells.counts)[name], expected, rtol=0, atol=1e-5)


def test_manifest_and_card_say_how(calibrated: tuple[run.Run, Path, Path]) -> None:
    """Methods and their log-losses, tables of reliability, sets and unknown cells; everything is annotated with."""
    made, _, version = calibrated
    model = serving.load(artifact.read(version), Runtime())
    manifest = model.manifest
    assert set(manifest.calibration) == {"lineage", "sublineage"}
    level = manifest.calibration["lineage"]
    assert level.cells == CALIBRATION
    assert level.method == min(level.candidates, key=lambda name: level.candidates[name])
    assert level.candidates[level.method] == pytest.approx(level.after.log_loss)
    assert sum(one.n_cells for one in level.after.bins) == level.n_cells == manifest.conformal.n_cells["lineage"]
    assert {trial.name for trial in manifest.unknown.left_out} == {"B", "T", "NK"}
    assert set(manifest.unknown.mean_auroc) == set(SCORES)
    best = max(manifest.unknown.mean_auroc.values())
    assert manifest.unknown.mean_auroc[manifest.unknown.score] == best
    card = model.card
    for text in ("## Calibration: lineage", "## Prediction sets", "## Unknown cells", f"`{manifest.unknown.score}`"):
        assert text in card
    found = annotate(model, made.test_cells.X, AnnotateOptions(coverage=0.9))
    assert {"mapping_score", "prediction_set_sublineage"} <= set(found)


def test_in_folds_all_cells_of_the_run_calibrate(in_folds: tuple[run.Run, Path, Path]) -> None:
    """Manifest and card say how many, and by which networks they were judged; the scores of sets are theirs."""
    made, _, version = in_folds
    model = serving.load(artifact.read(version), Runtime())
    manifest, n_cells = model.manifest, len(made.prepared.train)
    assert n_cells == made.reference.n_obs - made.test_cells.n_obs
    for level in manifest.calibration.values():
        assert (level.cells, level.n_cells, level.n_folds) == (TRAIN, n_cells, 3)
        assert sum(one.n_cells for one in level.after.bins) == n_cells
    assert manifest.conformal.n_cells == {"lineage": n_cells, "sublineage": n_cells}
    assert (manifest.unknown.cells, manifest.unknown.n_cells, manifest.unknown.n_folds) == (TRAIN, n_cells, 3)
    # A trial is asked about the known cells of one fold, and about all cells of its class.
    for trial in manifest.unknown.left_out:
        assert trial.n_known <= -(-n_cells // 3)
        assert (
            trial.n_unknown == (made.reference.obs["lineage"].iloc[folds.divide(made, 3).positions] == trial.name).sum()
        )
    judged = "each judged by one of 3 networks that was trained without its fold"
    assert f"fitted on {n_cells} train cells, {judged}" in model.card
    assert f"of {n_cells} train cells, {judged}" in model.card
    assert "Cross-conformal in 3 folds" in model.card
    assert "which the network's weights were not fitted on" not in model.card


def test_in_folds_figures_are_of_what_never_met_a_cell(in_folds: tuple[run.Run, Path, Path]) -> None:
    """Maps, log-losses and scores are those of the probabilities that the networks without a fold give, each as sure as the run's own."""
    from training.calibration import probabilities as fitting

    made, _, _ = in_folds
    assert made.calibration is not None
    given = folds.divide(made, 3)
    labels = made.prepared.train.labels[:, 0]
    np.testing.assert_array_equal(made.reference.obs_names[given.positions], made.prepared.train.names)

    def margin(log_p: np.ndarray, truth: np.ndarray) -> float:
        """Of the true class before the next, the median over cells."""
        true = log_p[np.arange(len(truth)), truth]
        others = np.where(np.arange(3) == truth[:, None], -np.inf, log_p)
        return float(np.median(true - others.max(axis=1)))

    raw = np.empty((len(labels), 3))
    for network, places in given.networks():
        rest = np.setdiff1d(np.arange(len(labels)), places)
        ours, theirs = (
            margin(
                np.log(calibrating.network_probabilities(one, made.prepared.train.take(rest))["lineage"]), labels[rest]
            )
            for one in (made, network)
        )
        assert ours > 0 < theirs != ours
        cells = made.prepared.train.take(places)
        logits = ours / theirs * np.log(calibrating.network_probabilities(network, cells)["lineage"])
        raw[places] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    level, group = made.calibration.levels["lineage"], np.zeros(3, np.int64)
    before = fitting.reliability(raw, labels)
    assert level.before.log_loss == pytest.approx(before.log_loss)
    assert level.before.expected_calibration_error == pytest.approx(before.expected_calibration_error)
    expected = fitting.fit_map(level.method, raw, labels, group)
    weight = made.calibration.maps.get("lineage", fitting.Map.identity(3)).weight
    np.testing.assert_allclose(weight, expected.weight, rtol=1e-4, atol=1e-6)
    served = fitting.apply_map(expected, raw, group)
    found = made.calibration.scores["lineage/scores"]
    np.testing.assert_allclose(found, 1 - served[np.arange(len(labels)), labels], atol=1e-5)
    without = {
        n: fitting.apply_map(fitting.fit_without(level.method, raw, labels, group, given.fold)[n], raw, group)
        for n in range(3)
    }
    assert [one for one in made.calibration.conformal.sizes if one.level == "lineage"] == sets.sizes(
        "lineage", without, labels, given.fold
    )


def test_a_run_that_is_surer_than_its_folds_is_calibrated_as_what_it_is(
    in_folds: tuple[run.Run, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits three times as large, its folds are taken to be three times as sure, and a map without a penalty undoes just that.

    The penalty that is served prefers logits as they are, so that with few cells it tells the two runs apart.
    """
    from training.calibration import probabilities as fitting

    made, _, _ = in_folds
    assert made.calibration is not None
    one, group = np.zeros(3, np.int64), np.zeros(4, np.int64)
    network_probabilities, fit_probabilities = calibrating.network_probabilities, calibrating._probabilities
    judged: list[np.ndarray] = []

    def surer(asked: run.Run, cells: Any) -> dict[str, np.ndarray]:
        found = network_probabilities(asked, cells)
        if asked is not made:
            return found
        return {
            name: fitting.apply_map(fitting.Map.scale(p.shape[1], 3.0), p, one if name == "lineage" else group)
            for name, p in found.items()
        }

    def watched(given: Any, raw: dict[str, np.ndarray], labels: Any) -> Any:
        judged.append(raw["lineage"].copy())
        return fit_probabilities(given, raw, labels)

    monkeypatch.setattr(calibrating, "_probabilities", watched)
    monkeypatch.setattr(calibrating, "network_probabilities", surer)
    calibrate(made, finds_unknown=False, n_folds=3)
    monkeypatch.setattr(calibrating, "METHODS", ("temperature",))
    monkeypatch.setattr(fitting, "PENALTY", 0.0)
    again = calibrate(made, finds_unknown=False, n_folds=3)
    monkeypatch.setattr(calibrating, "network_probabilities", network_probabilities)
    expected = calibrate(made, finds_unknown=False, n_folds=3)
    as_sure = fitting.apply_map(fitting.Map.scale(3, 3.0), judged[2], one)
    np.testing.assert_allclose(judged[0], as_sure, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(3 * again.maps["lineage"].weight, expected.maps["lineage"].weight, rtol=1e-2)
    np.testing.assert_allclose(again.scores["lineage/scores"], expected.scores["lineage/scores"], atol=1e-3)


def test_what_cannot_be_calibrated_in_folds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cells set apart for it, too few cells, weights of another run: said before anything is trained."""
    register(monkeypatch)
    apart = run.fit(tiny_config(split={"calibration": 0.2}), tmp_path / "apart", show_progress=False)
    made = run.fit(tiny_config(split={"validation": 0}), tmp_path / "whole", show_progress=False)
    monkeypatch.setattr(folds.fitting, "fit", None)
    with pytest.raises(CannotCalibrate, match="set apart for calibration, which folds would leave unused"):
        calibrate(apart, n_folds=3)
    with pytest.raises(CannotCalibrate, match=r"at least 10 are needed in each of 60 folds\. Take fewer folds"):
        calibrate(made, n_folds=60)
    with pytest.raises(CannotCalibrate, match=r"^0 validation cells .* with --folds 5"):
        calibrate(made)
    begun = made.config.model_copy(update={"start": Start(run="runs/parent")})
    with pytest.raises(CannotCalibrate, match="began with the weights of runs/parent"):
        calibrate(dataclasses.replace(made, config=begun), n_folds=3)


def test_what_is_read_is_what_was_written(either: tuple[run.Run, Path, Path], tmp_path: Path) -> None:
    """Figures and arrays alike; other weights make it stale."""
    made, directory, _ = either
    assert made.calibration is not None
    weights = directory / run.WEIGHTS
    stored.write(tmp_path, weights, made.calibration)
    again = stored.read(tmp_path, weights)
    assert again is not None
    assert (again.levels, again.conformal, again.unknown) == (
        made.calibration.levels,
        made.calibration.conformal,
        made.calibration.unknown,
    )
    assert (tmp_path / stored.ARRAYS).read_bytes() == (directory / stored.ARRAYS).read_bytes()
    other = tmp_path / "weights.npz"
    other.write_bytes(b"other")
    with pytest.raises(StaleCalibration, match="Run `python -m training calibrate"):
        stored.read(tmp_path, other)
    assert stored.read(tmp_path / "nothing", weights) is None


@pytest.mark.parametrize(("fixture", "n_folds"), [("calibrated", None), ("in_folds", 3)])
def test_test_cells_are_never_looked_at(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fixture: str, n_folds: int | None
) -> None:
    """Neither are they read, nor does anything change when their counts and labels do."""
    made, _, _ = request.getfixturevalue(fixture)
    seen: list[np.ndarray] = []

    def reading(one: run.Run, positions: np.ndarray) -> Any:
        seen.append(positions)
        return calibrating_read(one, positions)

    from training.evaluation.cells import read as calibrating_read

    monkeypatch.setattr(calibrating, "read", reading)
    monkeypatch.setattr(unknown, "read", reading)
    found = calibrate(made, share_of_epochs=0.4, n_folds=n_folds)
    test = made.split.positions(made.reference, TEST)
    assert len(seen) > 3
    assert not np.isin(np.concatenate(seen), test).any()
    changed = made.reference.copy()
    counts = changed.X.tolil()
    counts[test] = 1
    changed.X = counts.tocsr()
    changed.obs.loc[changed.obs_names[test], ["lineage", "sublineage"]] = ["B", "B1"]
    again = calibrate(dataclasses.replace(made, reference=changed), share_of_epochs=0.4, n_folds=n_folds)
    assert (again.levels, again.conformal, again.unknown) == (found.levels, found.conformal, found.unknown)


def test_the_left_out_class_is_gone_from_all_levels() -> None:
    """With its children; what the columns call it is then no class."""
    config = unknown.without(tiny_config(labels=LEVELS, fit={"max_epochs": 10}), "B", 0.3)
    assert [list(level.classes) for level in config.labels] == [["T", "NK"], ["T", "NK"]]
    assert config.labels[1].parents == {"T": "T", "NK": "NK"}
    assert config.fit.max_epochs == 3
    assert [level.name for level in config.label_levels] == ["lineage", "sublineage"]


@pytest.mark.parametrize("name", list(SCORES))
def test_every_score_can_be_served(calibrated: tuple[run.Run, Path, Path], name: str) -> None:
    """As a graph with stable bits in every place of a run, with torch's numbers, higher for cells of the reference than for nonsense."""
    made, _, _ = calibrated
    graphs = made.family.eval().graphs()
    counts = made.prepared.train.counts
    latent = over_rows(graphs["encode"].module, (counts,))
    reference = Reference(made.family, graphs, counts, latent, made.prepared.train.labels[:, 0], 0)
    arrays = SCORES[name].fit(reference)
    assert arrays is not None
    score = SCORES[name].build(graphs, arrays).eval()
    values = over_rows(score, tuple({"counts": counts, "latent": latent}[tensor] for tensor in score.inputs))
    kept = StoredScore(name, arrays, quantiles_of(values))
    graph = complete(graphs, made.config.label_levels, Calibration({}, {}, score=kept))["map_score"]
    cells = {"counts": counts[:9].toarray(), "latent": latent[:9]}
    example = {tensor: torch.from_numpy(array[:2]) for tensor, array in cells.items()}
    content = to_onnx(graph, example)
    from service.contract import onnx_file

    onnx_file.check(Path("map_score.onnx"), content)
    described = signature(content, "map_score.onnx")
    session = Session(content, Signature.model_validate(described.model_dump()), Runtime(), "map_score.onnx")
    found = session.prove_shapes({tensor: cells[tensor] for tensor in graph.inputs})["mapping_score"]
    assert found.shape == (9,)
    with torch.no_grad():
        expected = graph.module(*(torch.from_numpy(cells[tensor]) for tensor in graph.inputs)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_percentile_is_the_share_below() -> None:
    """In the middle by interpolation, 1 beyond the best, and below the worst it falls on towards 0 and keeps the order."""

    class Same(torch.nn.Module):
        inputs = ("latent",)

        def forward(self, known: torch.Tensor) -> torch.Tensor:
            return known[:, 0]

    percentile = Percentile(Same(), np.arange(11, dtype=np.float32))  # type: ignore[arg-type]
    found = percentile(torch.tensor([[-1000.0], [-10.0], [-5.0], [0.0], [5.0], [10.0], [99.0]])).tolist()
    assert found[3:] == pytest.approx([1 / 11, 1 / 11 + 10 / 11 / 2, 1.0, 1.0])
    assert 0 <= found[0] < found[1] < found[2] < found[3]
    assert found[2] == pytest.approx(found[3] / np.e)


def test_labels_that_contradict_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a cell, both of its classes, and the parent that was expected."""
    halves(monkeypatch)
    wrong = [LEVELS[0], LEVELS[1] | {"parents": {"B1": "B", "B2": "NK", "T": "T", "NK": "B"}}]
    with pytest.raises(
        LabelsContradict, match=r"cells, first 'tiny_a/cell\d+', are '.+' \(lineage\) and '.+' \(sublineage\)"
    ):
        run.fit(tiny_config(labels=wrong), tmp_path / "run", show_progress=False)


def test_a_finer_label_fills_the_broader_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A set that names the finer level only is trained on with both."""
    halves(monkeypatch)
    levels = [LEVELS[0] | {"data": ["tiny_a"]}, LEVELS[1]]
    made = run.fit(tiny_config(labels=levels), tmp_path / "run", show_progress=False)
    assert (made.reference.obs["lineage"].isin(["B", "T", "NK"])).all()


def test_calibration_cells_may_be_batches(tiny_sets: None) -> None:
    """They are neither trained nor tested on; the draw of the other parts does not depend on a share for calibration."""
    from tests.training.tiny import tiny_cells
    from training.data.prepared import split_reference
    from training.data.reference import join

    reference = join({name: tiny_cells(name) for name in ("tiny_a", "tiny_b")})
    reference.obs["plate"] = [f"{name}{i % 2}" for i, name in enumerate(reference.obs["dataset"])]
    config = tiny_config(
        batch_key="plate", split={"method": "held_out", "held_out": ["tiny_b"], "calibration": ["tiny_a1"]}
    )
    part = np.array(list(split_reference(config, reference).part.values()))
    assert set(part[(reference.obs["plate"] == "tiny_a1").to_numpy()]) == {CALIBRATION}
    assert set(part[(reference.obs["dataset"] == "tiny_b").to_numpy()]) == {TEST}
    plain = split_reference(tiny_config(), reference).part
    shared = split_reference(tiny_config(split={"calibration": 0.2}), reference).part
    assert {shared[name] for name in plain if plain[name] == "train"} == {"train", CALIBRATION}
    assert all(shared[name] == part for name, part in plain.items() if part != "train")
    with pytest.raises(ValueError, match="names in calibration belong to the method"):
        tiny_config(split={"calibration": ["tiny_a"]})


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says what it found; a run without labels cannot be calibrated; fitting again forgets the calibration."""
    register(monkeypatch)
    run.fit(tiny_config(), tmp_path / "run", show_progress=False)
    found = CliRunner().invoke(cli.app, ["calibrate", str(tmp_path / "run"), "--no-unknown"])
    assert found.exit_code == 0, found.output
    assert "expected calibration error" in found.output
    made = run.load(tmp_path / "run")
    assert made.calibration is not None
    assert made.calibration.unknown is None
    manifest = artifact.read_manifest(exporting.export(made, tmp_path / "store"))
    assert "map_score" not in manifest.graphs
    assert manifest.conformal is not None
    run.fit(made.config, tmp_path / "run", resume=True, show_progress=False)
    assert run.load(tmp_path / "run").calibration is None
    with pytest.raises(CannotCalibrate, match="has no classifier of labels"):
        calibrate(run.fit(tiny_config(labels=[]), tmp_path / "bare", show_progress=False))


def test_the_command_in_folds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says which network it trains; one fold would leave nothing to train it on; without validation cells nothing else will do."""
    register(monkeypatch)
    run.fit(tiny_config(split={"validation": 0}), tmp_path / "run", show_progress=False)
    found = CliRunner().invoke(cli.app, ["calibrate", str(tmp_path / "run"), "--no-unknown", "--folds", "2"])
    assert found.exit_code == 0, found.output
    assert "training without fold 2 of 2" in found.output
    made = run.load(tmp_path / "run")
    assert made.calibration is not None
    assert made.calibration.levels["cell_type"].n_folds == 2
    assert CliRunner().invoke(cli.app, ["calibrate", str(tmp_path / "run"), "--folds", "1"]).exit_code == 2


def test_levels_agree_without_calibration_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An artifact with a divided level is consistent before anybody calibrates it, and its card says that nobody did."""
    halves(monkeypatch)
    made = run.fit(tiny_config(labels=LEVELS), tmp_path / "run", show_progress=False)
    model = serving.load(artifact.read(exporting.export(made, tmp_path / "store")), Runtime())
    found = model.classify(made.test_cells.X)
    np.testing.assert_allclose(found["sublineage"][:, :2].sum(axis=1), found["lineage"][:, 0], rtol=1e-5)
    assert "`python -m training calibrate` was not run" in model.card


def test_every_family_can_be_calibrated(family_run: tuple[run.Run, Path], tmp_path: Path) -> None:
    """Serving knows nothing of it: each family's artifact annotates with all columns."""
    made = family_run[0]
    found = dataclasses.replace(made, calibration=calibrate(made, share_of_epochs=0.4))
    model = serving.load(artifact.read(exporting.export(found, tmp_path)), Runtime())
    answer = annotate(model, made.test_cells.X, AnnotateOptions(coverage=0.9, top_k=2))
    assert {"mapping_score", "prediction_set", "top_labels"} <= set(answer)
    assert set(model.manifest.calibration) == {"cell_type"}
    assert {trial.name for trial in model.manifest.unknown.left_out} == set(TYPES)


def test_sets_are_those_of_what_is_served(calibrated: tuple[run.Run, Path, Path]) -> None:
    """The scores that travel are what the exported graphs say of the calibration cells themselves, so that a limit is one for queries too."""
    made, _, version = calibrated
    assert made.calibration is not None
    model = serving.load(artifact.read(version), Runtime())
    cells = made.reference[made.split.positions(made.reference, CALIBRATION)]
    for level in made.config.label_levels:
        kind = cells.obs[level.name].astype(str)
        truth = np.array([list(level.classes).index(name) for name in kind])
        said = model.classify(cells[:, made.prepared.var.index].X)[level.name].astype(np.float64)
        others = np.where(np.arange(said.shape[1]) == truth[:, None], 0, said).sum(axis=1)
        np.testing.assert_allclose(made.calibration.scores[f"{level.name}/scores"], others, atol=1e-5)
