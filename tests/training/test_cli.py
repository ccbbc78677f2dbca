"""The commands, as a user types them."""

import sys
from pathlib import Path

import pytest
import yaml

from tests.training.evaluation.conftest import hide
from tests.training.tiny import SETTINGS
from training import cli
from training.evaluation import command as evaluation


@pytest.fixture
def command(tiny_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `python -m training <words>` in an empty directory that has tiny.yaml; gives exit code, output and errors."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "width", 200)
    monkeypatch.setattr(evaluation.console, "width", 200)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["training", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def test_from_counts_to_a_version_and_back(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fit, evaluate, export, reproduce; reproduce fails where a graph differs."""
    hide(monkeypatch, "scib_metrics")  # which compiles for a minute
    code, out, _ = command("fit", "tiny.yaml", "--output", "run", "--set", "fit.max_epochs=2")
    assert code == 0
    assert "of 2, validation loss" in out
    assert "cells/s" in out
    code, out, _ = command("evaluate", "run")
    assert (code, "tiny_a → tiny_b" in out) == (0, True)
    code, out, _ = command("export", "run")
    assert (code, out.strip()) == (0, "models_store/tiny/1")
    # A graph that the version does not have is not missed in it.
    code, out, _ = command(
        "reproduce", "tiny.yaml", "--set", "fit.max_epochs=2", "--set", "export.reference.project=true"
    )
    assert (code, out.count("yes"), "project" in out) == (0, 6, False)
    code, out, _ = command("reproduce", "tiny.yaml", "--set", "fit.max_epochs=2", "--set", "seed=1")
    # The transform has no weights: it is the same whatever the seed.
    assert (code, out.count("no "), out.count("yes")) == (1, 5, 1)
    code, _, err = command("export", "run", "--version", "1")
    assert (code, "exists" in err) == (2, True)


def test_a_version_calibrated_in_folds_is_reproduced(command) -> None:
    """Without validation cells; the manifest says in how many folds."""
    without = ("--set", "split.validation=0")
    code, out, _ = command("fit", "tiny.yaml", "--output", "run", *without)
    assert (code, "run: last epoch of 3, no validation cells, " in out) == (0, True)
    code, _, err = command("calibrate", "run")
    assert (code, "--folds 5" in err) == (2, True)
    assert command("calibrate", "run", "--folds", "2", "--no-unknown")[0] == 0
    assert command("export", "run")[0] == 0
    code, out, _ = command("reproduce", "tiny.yaml", *without)
    assert (code, out.count("yes"), "no " in out) == (0, 6, False)


def test_data_sets_are_listed(command) -> None:
    """With shape, licence and whether they are here."""
    code, out, _ = command("datasets")
    assert code == 0
    for words in ("pbmc_facs", "2,638 cells", "CC BY 4.0", "pbmc_meta.rda", "Cache:"):
        assert words in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "absent.yaml", "--output", "run"), "absent.yaml cannot be read"),
        (("fit", "tiny.yaml", "--output", "run", "--device", "tpu"), "fit.device"),
        (("export", "nowhere"), "nowhere holds no finished run"),
        (("fit", "tiny.yaml", "--output", "run", "--set", "data=[none]"), "There is no data set 'none'"),
        (("reproduce", "tiny.yaml"), "There is no model 'tiny'"),
    ],
)
def test_errors_are_one_sentence(command, words: tuple[str, ...], message: str) -> None:
    """No traceback, exit code 2."""
    code, out, err = command(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
