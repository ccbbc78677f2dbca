"""What a process that serves is made of: store → sessions → batcher → tasks → API."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from service import metrics
from service.api import logs
from service.api.client_budget import ClientBudgets
from service.api.drain import drain_on_signal
from service.api.limits import Intake
from service.api.routes import build_api
from service.api.state import State
from service.api.uploads import Uploads
from service.contract.store import Store
from service.inference.answer_cache import AnswerCache
from service.inference.batcher import Batcher
from service.inference.cached import CachedRuns
from service.inference.here import choose_here
from service.inference.models import Models
from service.inference.session import choose_runtime, usable_cpus
from service.inference.shadow import Shadows
from service.settings import Settings

if TYPE_CHECKING:
    from service.trace_export import Traces

N_PARSERS = 2
"""Threads that parse: one may wait for the interpreter's lock while the other is in numpy or Arrow."""


class Worker:
    """All parts of one process, and when they begin and end."""

    def __init__(self, settings: Settings, traces: "Traces | None") -> None:
        """Build the parts; nothing runs yet.

        Args:
            settings: read from the environment.
            traces: what makes and sends spans; None where requests are not traced.

        Raises:
            ProviderUnavailable: the provider of the settings is not there.
        """
        logs.configure(settings.log_level)
        runtime = choose_runtime(settings.provider, settings.threads, settings.allow_provider_fallback)
        self._settings = settings
        models = Models(store=Store(settings.store), runtime=runtime, max_loaded=settings.max_loaded)
        here = choose_here(usable_cpus())
        batcher = Batcher(batch_rows=settings.batch_rows, max_queue_rows=settings.max_queue_rows, here=here)
        metrics.THREADS.labels("graph").set(runtime.n_threads)
        metrics.THREADS.labels("parse").set(N_PARSERS)
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
            here=here,
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
            traces=traces,
            admin_token=settings.admin_token.get_secret_value() if settings.admin_token is not None else None,
        )
        self.api = build_api(self.state)

    def start(self) -> None:
        """Take work, and load models meanwhile; to be called in the event loop."""
        self.state.batcher.start()
        self.state.models.start(self._settings.store_poll_s)
        if threading.current_thread() is threading.main_thread():  # elsewhere, as in a test, no signal can be had
            drain_on_signal(self.state, self._settings.drain_seconds)

    async def stop(self) -> None:
        """End the queue."""
        self.state.is_draining = True
        self.state.shadows.stop()
        self.state.models.stop()
        await self.state.batcher.stop()
        self.state.uploads.close()
        await asyncio.to_thread(self._parsers.shutdown)
        if self.state.traces is not None:
            await asyncio.to_thread(self.state.traces.stop)
