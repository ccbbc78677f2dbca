"""Fixtures of the training tests."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests.training.tiny import register, tiny_config
from training import export as exporting
from training import run
from training.families import FAMILIES


@pytest.fixture(scope="session", autouse=True)
def known_operators() -> Iterator[None]:
    """Torch's exporter reads the source of all its operators for each graph anew: a third of what exporting a tiny model takes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[run.Run]:
    """A finished tiny run, for what is the same for every family."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        yield run.fit(tiny_config(), tmp_path_factory.mktemp("tiny") / "run", show_progress=False)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[run.Run, Path]]:
    """A finished tiny run that has met all of its cells, and its directory."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        yield run.fit(tiny_config(split={"test": 0, "validation": 0}), directory, show_progress=False), directory
