"""Serving needs no torch: every module of service/ is imported in a fresh interpreter, and what it pulled in is looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Walking the package matters: service.app alone does not reach every file.
IMPORT_ALL = """
import importlib, pkgutil, sys, service
for module in pkgutil.walk_packages(service.__path__, "service."):
    importlib.import_module(module.name)
print(*sorted({"torch", "onnx", "lightning", "scanpy", "training"} & sys.modules.keys()))
"""


def pulled_in(folder: Path) -> str:
    """Which of the forbidden modules are loaded once all of `service` below `folder` is."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{IMPORT_ALL}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_service_needs_no_torch() -> None:
    """No module of service/ imports torch, onnx, lightning, scanpy or training, not even through a library."""
    pytest.importorskip("torch", reason="without torch installed this would prove nothing")
    assert pulled_in(ROOT) == ""


@pytest.mark.parametrize("module", ["torch", "onnx"])
def test_the_probe_would_notice(tmp_path: Path, module: str) -> None:
    """An import deep inside a package that nothing else imports is found."""
    (tmp_path / "service/cells").mkdir(parents=True)
    (tmp_path / "service/__init__.py").touch()
    (tmp_path / "service/cells/__init__.py").touch()
    (tmp_path / "service/cells/hidden.py").write_text(f"import {module}\n")

    assert module in pulled_in(tmp_path)
