"""Runs side by side: what is told is what the runs' files say, and no cell is read for it."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.training.tiny import SETS, register, tiny_config
from training import cli, run
from training.data import registry
from training.report import compare as comparing

CHANGES = {
    "wide": {},
    "narrow": {"model": {"hidden": [16], "n_latent": 2}},
    "squared": {"family": "autoencoder", "model": {"hidden": [16], "n_latent": 4, "likelihood": "mse"}},
    "alone": {"data": ["tiny_a"]},
}


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of tiny runs; the cells are gone from the registry when a test reads it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        for name, changes in CHANGES.items():
            run.fit(tiny_config(**changes), folder / name, show_progress=False)
    evaluation = {
        "schema_version": 1,
        "seed": 7,
        "annotation": [{"query": "held_out", "ours": {"accuracy": 0.5}}],
        "models": {"best": {"epoch": 2, "loss": {"test": {"loss": 3.0}}, "latent": {"silhouette": 0.25, "n_cells": 9}}},
    }
    (folder / "narrow" / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in SETS:
            # No cell can be read any more.
            monkeypatch.delitem(registry.DATASETS, name, raising=False)
        yield folder


def test_a_run_without_validation_cells_has_no_loss_to_compare(
    runs_folder: Path, whole_run: tuple[run.Run, Path]
) -> None:
    """It stands behind those that have one, and is no broken run."""
    found = comparing.compare([whole_run[1], runs_folder / "alone", runs_folder / "wide"])
    entry = next(entry for entry in found.entries if entry.directory == whole_run[1])
    assert entry.losses == {}
    assert found.groups[entry.group][-1] is entry
    (row,) = [values for name, values in comparing.rows(found) if name == "validation loss"]
    assert row[found.entries.index(entry)] == "-"
    assert comparing.plot(found, "svg").data


def test_figures_are_those_of_the_files(runs_folder: Path) -> None:
    """Loss and parts at the best epoch, seconds, weights and evaluation are read, not guessed."""
    found = comparing.compare([runs_folder / "wide", runs_folder / "narrow"])
    for entry in found.entries:
        provenance = json.loads((entry.directory / "provenance.json").read_text())
        metrics = pd.read_csv(entry.directory / "metrics.csv").set_index("epoch").loc[provenance["best_epoch"]]
        assert entry.best_epoch == provenance["best_epoch"] + 1
        assert entry.losses["loss"] == pytest.approx(provenance["best_validation_loss"], rel=1e-6)
        parts = {name.removeprefix("validation_") for name in metrics.index if name.startswith("validation_")}
        assert set(entry.losses) == parts
        assert len(parts) > 2
        assert all(entry.losses[part] == metrics[f"validation_{part}"] for part in parts)
        assert entry.seconds == provenance["seconds"]
        assert 0 < entry.n_parameters == provenance["n_parameters"]
        with np.load(entry.directory / "weights.npz") as arrays:
            assert entry.n_stored == sum(arrays[name].size for name in arrays.files)
    narrow = next(entry for entry in found.entries if entry.label == "narrow")
    assert narrow.evaluation["annotation.held_out.ours.accuracy"] == 0.5
    assert comparing.headlines(narrow) == {"latent.silhouette": 0.25}


def test_only_keys_that_differ_are_told(runs_folder: Path) -> None:
    """Defaults of the family count as settings; a key that the other family lacks is a difference with a dash."""
    assert comparing.compare([runs_folder / "wide", runs_folder / "narrow"]).differing == ("model.n_latent",)
    assert comparing.compare([runs_folder / "wide", runs_folder / "alone"]).differing == ("data",)
    found = comparing.compare([runs_folder / "wide", runs_folder / "squared"])
    assert "model.likelihood" in found.differing
    assert "model.n_latent" not in found.differing
    assert "family" not in found.differing
    rows = dict(comparing.rows(found))
    own = next(key for key in found.differing if key not in found.entries[0].settings)
    assert rows[own][0] == "-"


def test_runs_are_grouped_and_sorted(runs_folder: Path) -> None:
    """Other likelihoods and other data are other groups; within a group the lowest loss is first, however they were given."""
    names = ["squared", "alone", "narrow", "wide"]
    found = comparing.compare([runs_folder / name for name in names])
    again = comparing.compare([runs_folder / name for name in reversed(names)])
    assert [entry.label for entry in found.entries] == [entry.label for entry in again.entries]
    groups = [{entry.label for entry in entries} for entries in found.groups.values()]
    assert sorted(map(sorted, groups)) == [["alone"], ["narrow", "wide"], ["squared"]]
    for entries in found.groups.values():
        losses = [entry.losses["loss"] for entry in entries]
        assert losses == sorted(losses)


def test_a_directory_that_is_no_run_is_named(runs_folder: Path, tmp_path: Path) -> None:
    """An empty directory, one that is not there, and a run that is spoiled."""
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(run.NotARun, match=f"{directory} holds no finished run: config.yaml"):
            comparing.compare([runs_folder / "wide", directory])
    for name in ("config.yaml", "genes.tsv", "weights.npz"):
        (tmp_path / name).write_bytes((runs_folder / "wide" / name).read_bytes())
    (tmp_path / "provenance.json").write_text("{}")
    with pytest.raises(run.NotARun, match=f"{tmp_path} holds a run that cannot be read .KeyError: 'best_epoch'"):
        comparing.compare([tmp_path])


def test_a_run_without_metrics_has_the_loss_of_its_provenance(runs_folder: Path, tmp_path: Path) -> None:
    """The rest of the comparison does not suffer, and the plot leaves the curve out."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.yaml", "genes.tsv", "weights.npz", "provenance.json"):
        (copy / name).write_bytes((runs_folder / "wide" / name).read_bytes())
    found = comparing.compare([copy, runs_folder / "wide"])
    losses = {entry.label: entry.losses for entry in found.entries}
    assert set(losses["copy"]) == {"loss"}
    assert losses["copy"]["loss"] == pytest.approx(losses["wide"]["loss"], rel=1e-6)
    assert found.differing == ()
    assert b"<svg" in comparing.plot(found, "svg").data


def test_command_prints_and_writes(runs_folder: Path, tmp_path: Path) -> None:
    """The table, what may be compared, JSON that holds everything, and a plot with a panel per group."""
    written, drawn = tmp_path / "new/comparison.json", tmp_path / "new/curves.svg"
    directories = [str(runs_folder / name) for name in CHANGES]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(
        cli.app, ["compare", *directories, "--json", str(written), "--plot", str(drawn)]
    )
    assert result.exit_code == 0, result.output
    assert "Losses can be compared within one group only" in result.output
    assert "negative_binomial on tiny_a, tiny_b" in result.output
    document = json.loads(written.read_text())
    assert {Path(entry["directory"]).name for entry in document["runs"]} == set(CHANGES)
    assert {entry["settings"]["model.n_latent"] for entry in document["runs"]} == {2, 4}
    for entry in document["runs"]:
        assert f"{entry['validation']['loss']:.4g}" in result.output
    titles = [group for group in ET.fromstring(drawn.read_text()).iter() if group.get("id", "").startswith("axes_")]
    assert len(titles) == 3


def test_a_plot_of_an_unknown_kind_is_refused(runs_folder: Path, tmp_path: Path) -> None:
    """Before anything is read or written."""
    result = CliRunner().invoke(cli.app, ["compare", str(tmp_path), "--plot", str(tmp_path / "curves.txt")])
    assert isinstance(result.exception, comparing.UnknownPlotFormat)
    assert "must end in .svg or .png" in str(result.exception)
    assert comparing.UnknownPlotFormat in cli.USER_ERRORS
