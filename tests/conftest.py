"""Fixtures for tests within one process: a tiny model, and the HTTP application over it."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import metrics
from service.api.limits import Intake
from service.api.routes import build_api
from service.api.state import State
from service.api.uploads import Uploads
from service.contract import artifact
from service.contract.store import Store
from service.inference.answer_cache import AnswerCache
from service.inference.batcher import Batcher
from service.inference.cached import CachedRuns
from service.inference.model import Model, load
from service.inference.models import Models
from service.inference.session import Runtime
from service.inference.shadow import Shadows
from tests.builders import write_artifact

# They need a built image and a container engine: `make test-image` names both.
collect_ignore = [] if "CELLSERVE_TEST_IMAGE" in os.environ else ["container"]

# Importing service.app sets BentoML up; its files must not land in the user's home.
os.environ.setdefault("BENTOML_HOME", tempfile.mkdtemp(prefix="cellserve-bentoml-"))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one tiny model."""
    root = tmp_path_factory.mktemp("store")
    write_artifact(root)
    return root


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Model:
    """The tiny model, loaded."""
    return load(artifact.read(tiny_path / "tiny/1"), Runtime())


@pytest.fixture(scope="session")
def calibrated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one tiny model with levels, calibration scores and a mapping score."""
    root = tmp_path_factory.mktemp("calibrated")
    write_artifact(root, is_calibrated=True)
    return root


@pytest.fixture(scope="session")
def calibrated(calibrated_path: Path) -> Model:
    """That model, loaded."""
    return load(artifact.read(calibrated_path / "tiny/1"), Runtime())


@asynccontextmanager
async def serving(store: Path, is_loaded: bool = True, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application over a store; `changes` replace numbers of Batcher, Intake and State."""
    models = Models(store=Store(store), runtime=Runtime(), max_loaded=changes.pop("max_loaded", None))
    if is_loaded:
        models.load_all()
    batcher = Batcher(batch_rows=changes.pop("batch_rows", 256), max_queue_rows=changes.pop("max_queue_rows", 10_000))
    intake = Intake(
        changes.pop("max_body_bytes", 2**24), changes.pop("max_bytes_in_flight", 2**25), changes.pop("body_timeout", 5)
    )
    uploads = Uploads(
        Intake(
            changes.pop("max_upload_bytes", 2**24),
            changes.pop("max_upload_bytes_in_flight", 2**26),
            changes.pop("upload_timeout", 5),
            metrics.UPLOAD_BYTES_IN_FLIGHT,
        ),
        changes.get("max_cells", 5_000),
        changes.pop("parse_seconds", 20),
        changes.pop("parse_memory_bytes", 2**30),
        changes.pop("upload_directory", None),
    )
    cache_bytes = changes.pop("cache_bytes", None)
    numbers = {"max_cells": 5_000, "max_decoded_bytes": 2**26, "timeout_seconds": 10.0, **changes}
    with ThreadPoolExecutor(2) as parsers:
        shadows = Shadows(models, batcher)
        if cache_bytes is not None:
            numbers["cached"] = CachedRuns(batcher, AnswerCache(cache_bytes), parsers)
        state = State(
            models=models, batcher=batcher, shadows=shadows, intake=intake, uploads=uploads, parsers=parsers, **numbers
        )
        batcher.start()
        transport = httpx.ASGITransport(build_api(state), raise_app_exceptions=False)

        async def next_turn(_: httpx.Response) -> None:
            """An answer is counted when it is out, which over a socket nobody notices."""
            await asyncio.sleep(0)

        hooks = {"response": [next_turn]}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", event_hooks=hooks) as client:
            client.state = state  # type: ignore[attr-defined]
            yield client
        shadows.stop()
        models.stop()
        await batcher.stop()
        uploads.close()


@pytest.fixture
async def client(tiny_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application over the tiny model."""
    async with serving(tiny_path) as client:
        yield client
