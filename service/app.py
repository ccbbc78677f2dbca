"""The BentoML service: reads settings, builds store → sessions → batcher → tasks → API, and drains. The only importer of bentoml.

BentoML supervises processes, builds and containerises. HTTP goes straight to our own application, past BentoML's middleware: that one
answers errors in two other forms, labels metrics by raw path, hangs probes while a model loads, and frees a slot on a timeout while its
work runs on (see docs/architecture.md).
"""

import asyncio
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Before bentoml is imported: it phones home unless this says exactly "true".
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
# Before prometheus_client is imported: with one worker there is nothing to add up over processes (see metrics.py).
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
from _bentoml_sdk import Service
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.api import logs, openapi
from service.api.client_budget import ClientBudgets
from service.api.drain import drain_on_signal
from service.api.limits import Intake
from service.api.routes import build_api
from service.api.state import State
from service.api.uploads import Uploads
from service.contract.store import Store
from service.errors import ProviderUnavailable
from service.inference.answer_cache import AnswerCache
from service.inference.batcher import Batcher
from service.inference.cached import CachedRuns
from service.inference.models import Models
from service.inference.session import choose_runtime
from service.inference.shadow import Shadows
from service.settings import SettingsError, read_settings

N_PARSERS = 2
"""Threads that parse: one may wait for the interpreter's lock while the other is in numpy or Arrow."""


class DirectService(Service[Any]):
    """A BentoML service whose requests are answered by our own application; BentoML keeps its life cycle."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """The application that a worker runs."""
        lifecycle = super().to_asgi(is_main=is_main)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await bentoml.get_current_service().api(scope, receive, send)
            else:
                await lifecycle(scope, receive, send)

        return app

    @property
    def openapi_spec(self) -> Any:
        """What `bentoml build` writes to apis/openapi.yaml."""
        return openapi.document()


@bentoml.service(
    name="cellserve",
    description="Embed, reconstruct and annotate single cells against a reference model, without torch.",
    service_class=DirectService,
    # One worker holds one copy of each model and one queue: what arrives together runs together.
    workers=1,
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class CellServe:
    """One worker's service. Models load in the background, so that probes are answered from the start."""

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Once in the parent, before any worker: a worker that cannot start would be started again for ever."""
        try:
            settings = read_settings()
            choose_runtime(settings.provider, settings.threads, settings.allow_provider_fallback)
        except (SettingsError, ProviderUnavailable) as error:
            sys.exit(f"cellserve cannot start: {error}")

    def __init__(self) -> None:
        settings = read_settings()
        logs.configure(settings.log_level)
        runtime = choose_runtime(settings.provider, settings.threads, settings.allow_provider_fallback)
        self._settings = settings
        models = Models(store=Store(settings.store), runtime=runtime, max_loaded=settings.max_loaded)
        batcher = Batcher(batch_rows=settings.batch_rows, max_queue_rows=settings.max_queue_rows)
        self._parsers = ThreadPoolExecutor(N_PARSERS, thread_name_prefix="cellserve-parse")
        cache = AnswerCache(settings.cache_bytes) if settings.cache_bytes is not None else None
        self.state = State(
            models=models,
            batcher=batcher,
            shadows=Shadows(models, batcher),
            intake=Intake(settings.max_body_bytes, settings.max_body_bytes_in_flight, settings.body_timeout_seconds),
            uploads=Uploads(
                Intake(
                    settings.max_upload_bytes,
                    settings.max_upload_bytes_in_flight,
                    settings.upload_timeout_seconds,
                    metrics.UPLOAD_BYTES_IN_FLIGHT,
                ),
                settings.max_cells,
                settings.parse_seconds,
                settings.parse_memory_bytes,
                settings.upload_directory,
            ),
            parsers=self._parsers,
            max_cells=settings.max_cells,
            max_decoded_bytes=settings.max_decoded_bytes,
            timeout_seconds=settings.timeout_seconds,
            stall_seconds=settings.stall_seconds,
            cached=CachedRuns(batcher, cache, self._parsers) if cache is not None else None,
            budgets=ClientBudgets(
                settings.client_budget_per_second, settings.client_budget_burst, settings.client_budget_keys
            )
            if settings.client_budget_per_second is not None
            else None,
            admin_token=settings.admin_token.get_secret_value() if settings.admin_token is not None else None,
        )
        self.api = build_api(self.state)

    @bentoml.on_startup
    async def start(self) -> None:
        """Take work, and load models meanwhile."""
        self.state.batcher.start()
        self.state.models.start(self._settings.store_poll_s)
        if threading.current_thread() is threading.main_thread():  # elsewhere, as in a test, no signal can be had
            drain_on_signal(self.state, self._settings.drain_seconds)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End the queue. Requests in flight have completed before (see drain.py)."""
        self.state.is_draining = True
        self.state.shadows.stop()
        self.state.models.stop()
        await self.state.batcher.stop()
        self.state.uploads.close()
        await asyncio.to_thread(self._parsers.shutdown)
