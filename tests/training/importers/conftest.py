"""Models that scvi-tools saved, made by it where there is an environment with it."""

import os
import subprocess
from pathlib import Path

import pytest

from training.data import registry

ROOT = Path(__file__).parents[3]
PUBLISHED = registry.cache_directory() / "scvi_models"


@pytest.fixture(scope="session")
def scvi_python() -> Path:
    """An interpreter with scvi-tools (make bench); CELLSERVE_BENCH_PYTHON names another."""
    path = Path(os.environ.get("CELLSERVE_BENCH_PYTHON", ROOT / ".venv-bench/bin/python"))
    if not path.exists():
        pytest.skip(f"no {path}: `make bench` makes the environment with scvi-tools")
    return path


@pytest.fixture(scope="session")
def saved_models(scvi_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of today's scvi-tools, a folder each; CELLSERVE_SCVI_MODELS names a folder that was made before."""
    if made := os.environ.get("CELLSERVE_SCVI_MODELS"):
        return Path(made)
    folder = tmp_path_factory.mktemp("scvi")
    command = [str(scvi_python), str(Path(__file__).with_name("save_with_scvi.py")), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder


@pytest.fixture(params=["scvi_0.15.0", "scanvi_pre_1.1"])
def published_model(request: pytest.FixtureRequest) -> Path:
    """A model that an old scvi-tools saved, as published."""
    path = PUBLISHED / request.param
    if not path.exists():
        pytest.skip(f"{request.param} is not in {PUBLISHED}")
    return path
