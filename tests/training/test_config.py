"""Configurations: files and flags fill the same model, and what is wrong is named."""

from pathlib import Path

import pytest
import yaml

from tests.training.tiny import SETTINGS, tiny_config
from training import config as configuration
from training.data import registry

CONFIGS = sorted((Path(configuration.__file__).parent / "configs").glob("*.yaml"))


def written(path: Path, **changes: object) -> Path:
    """The tiny settings as a file."""
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_config_is_valid(path: Path) -> None:
    """It opens with the command that runs it, its data sets exist, and it reads back."""
    config = configuration.load(path)
    assert f"python -m training fit training/configs/{path.name}" in path.read_text().split("name:")[0]
    assert all(name in registry.DATASETS for name in config.data if isinstance(name, str))
    assert configuration.Config.model_validate(yaml.safe_load(config.dump())) == config


def test_the_shipped_config_has_the_eight_types() -> None:
    """By these names, each with its Cell Ontology term."""
    level = configuration.load(next(path for path in CONFIGS if path.stem == "pbmc")).labels[0]
    assert level.name == "cell_type"
    assert list(level.classes) == ["B", "CD4 T", "CD8 T", "NK", "Monocyte", "Dendritic", "CD34+ progenitor", "Platelet"]
    assert all(term.startswith("CL:") for term in level.classes.values())


def test_files_stand_beside_registered_sets(tmp_path: Path) -> None:
    """A file has a name in the run, and the configuration reads back with it."""
    data = ["tiny_a", {"name": "mine", "path": "cells.h5ad", "columns": {"cell_type": "CellType"}}]
    config = configuration.load(written(tmp_path / "tiny.yaml", data=data))
    assert config.datasets == ("tiny_a", "mine")
    assert configuration.Config.model_validate(yaml.safe_load(config.dump())) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    """Values are YAML, keys reach into sections."""
    path = written(tmp_path / "tiny.yaml")
    config = configuration.load(path, ("fit.max_epochs=7", "model.hidden=[5, 6]", "seed=3", "summary=a b"))
    assert config.fit.max_epochs == 7
    assert config.hyperparameters.hidden == (5, 6)
    assert (config.seed, config.summary) == (3, "a b")


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    """With the key of each."""
    path = written(tmp_path / "tiny.yaml", fit={"epochs": 3, "rows": 0}, seed="x")
    with pytest.raises(configuration.InvalidConfig, match=r"tiny\.yaml: fit\.rows.*fit\.epochs.*seed"):
        configuration.load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("family=cnn", "one of atlas_vae, autoencoder"),
        ("genes.rule=best", "one of seurat"),
        ("model.n_latents=3", "n_latents"),
        ("split.method=half", "one of stratified, random, sequential, held_out"),
        ("split.held_out=[tiny_a]", "belongs to the method"),
        ("split.method=held_out", "needs it"),
        ("split={test: 0.6, validation: 0.5}", "no cell to train on"),
        ("genes.rule=names", "needs them"),
        ("data=[tiny_a, tiny_a]", "two data sets"),
        ("data=[tiny_a, {name: b, path: b.zarr, backed: true}]", "stay on disk"),
        ("seed", "key.sub=value"),
        ("name.sub=1", "name is a value"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, override: str, message: str) -> None:
    """Before any data is read."""
    with pytest.raises(configuration.InvalidConfig, match=message):
        configuration.load(written(tmp_path / "tiny.yaml"), (override,))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    """With its path."""
    with pytest.raises(configuration.InvalidConfig, match=r"absent\.yaml"):
        configuration.load(tmp_path / "absent.yaml")


def test_a_config_is_immutable() -> None:
    """What a run was made with cannot change under it."""
    with pytest.raises(ValueError, match="frozen"):
        tiny_config().seed = 1
