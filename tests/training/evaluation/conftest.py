"""Each family evaluated once, by the command."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from training import cli, run
from training.evaluation import annotation, command

Evaluated = tuple[run.Run, Path, dict[str, Any]]


@pytest.fixture(scope="session")
def evaluated(family_run: tuple[run.Run, Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """A finished tiny run of each family, its directory, and what `evaluate --model all` wrote.

    Without what takes most of the time and is tested elsewhere: scib-metrics (test_integration.py) and the choice of C
    (test_annotation.py).
    """
    made, original = family_run
    directory = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(original, directory)
    with pytest.MonkeyPatch.context() as monkeypatch:
        hide(monkeypatch, "scib_metrics")
        monkeypatch.setattr(annotation, "REGRESSIONS", {"logistic_regression": ((1.0,), None)})
        monkeypatch.setattr(command.console, "width", 200)
        words = ("evaluate", str(directory), "--model", "all", "--no-across", "--label", "batch")
        monkeypatch.setattr(sys, "argv", ["training", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
    return made, directory, json.loads((directory / "evaluation.json").read_text())


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package seem not to be installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))


@pytest.fixture
def type_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `python -m training <words>`; gives exit code, output and errors."""
    monkeypatch.setattr(command.console, "width", 200)

    def typed(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["training", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return typed
