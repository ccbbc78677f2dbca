"""What it costs to import the service: BentoML's parent process does so as well, and only supervises; a worker does at every start."""

import subprocess
import sys

import pytest

HEAVY = ("numpy", "onnxruntime", "pyarrow", "scipy")


def loaded(module: str, *watched: str) -> list[str]:
    """Which of the watched modules are there once a module is imported in a fresh interpreter."""
    code = f"import sys, {module}\nprint(*sorted(set({watched}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_parent_process_is_light() -> None:
    """Importing service.app loads none of the libraries that do the work; only a worker needs them."""
    assert loaded("service.app", *HEAVY) == []


@pytest.mark.parametrize("module", ["h5py", "scipy.special", "opentelemetry.sdk"])
def test_a_worker_starts_without_what_few_requests_need(module: str) -> None:
    """Files are read in another process; markers and traces load what they need when they are asked for."""
    assert loaded("service.worker", *HEAVY, module) == sorted(HEAVY)
