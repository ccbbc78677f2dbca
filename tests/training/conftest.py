"""Fixtures of the training tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.tiny import register, tiny_config
from training import export as exporting
from training import run
from training.families import FAMILIES


@pytest.fixture
def tiny_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny data sets are in the registry."""
    register(monkeypatch)


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[run.Run, Path]]:
    """A finished tiny run of each family, and its directory."""
    directory = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        yield run.fit(tiny_config(family=request.param), directory, show_progress=False), directory


@pytest.fixture(scope="session")
def exported(family_run: tuple[run.Run, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version directory of each family's tiny run."""
    return exporting.export(family_run[0], tmp_path_factory.mktemp("store"))
