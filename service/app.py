"""The BentoML service: reads settings and hands its life cycle to worker.py. The only importer of bentoml.

BentoML supervises processes, builds and containerises. HTTP goes straight to our own application, past BentoML's middleware: that one
answers errors in two other forms, labels metrics by raw path, hangs probes while a model loads, and frees a slot on a timeout while its
work runs on (see docs/architecture.md).
"""

import os
import sys
from typing import TYPE_CHECKING, Any

# It phones home unless this says exactly "true".
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
# Before prometheus_client is imported: with one worker there is nothing to add up over processes (see metrics.py).
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
from _bentoml_sdk import Service
from bentoml._internal.utils.analytics import usage_stats
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ProviderUnavailable
from service.settings import SettingsError, read_settings, traces_exporter

if TYPE_CHECKING:
    from service.trace_export import Traces

# `bentoml serve` has looked at the variable, and kept the answer, before it imported this file.
usage_stats.do_not_track.cache_clear()

# What does the work is imported by the worker alone (worker.py): BentoML's parent process imports this file as well, and only supervises.
# It needs no numpy, scipy, Arrow or ONNX Runtime (tests/service/test_app.py).


def make_traces(is_check: bool = False) -> "Traces | None":
    """What makes and sends spans, where OTEL_* asks for them.

    Raises:
        SettingsError: what OTEL_* asks for is not there, or a limit is no number.
    """
    exporter = traces_exporter()
    if exporter is None:
        return None
    from service import trace_export  # OpenTelemetry's SDK: only where it is asked for

    try:
        trace_export.span_limits()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return None if is_check else trace_export.Traces(trace_export.make_exporter(exporter))


class DirectService(Service[Any]):
    """A BentoML service whose requests are answered by our own application; BentoML keeps its life cycle."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """The application that a worker runs."""
        lifecycle = super().to_asgi(is_main=is_main)
        api: ASGIApp | None = None

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal api
            if scope["type"] == "http":
                # Asked once: looking for it costs as much as finding the route of a request.
                api = api or bentoml.get_current_service().api
                await api(scope, receive, send)
            else:
                await lifecycle(scope, receive, send)

        return app

    @property
    def openapi_spec(self) -> Any:
        """What `bentoml build` writes to apis/openapi.yaml."""
        from service.api import openapi

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
            make_traces(is_check=True)
            if settings.provider != "cpu":
                from service.inference.session import choose_runtime

                choose_runtime(settings.provider, settings.threads, settings.allow_provider_fallback)
        except (SettingsError, ProviderUnavailable) as error:
            sys.exit(f"cellserve cannot start: {error}")

    def __init__(self) -> None:
        from service.worker import Worker

        self._worker = Worker(read_settings(), make_traces())
        self.api = self._worker.api

    @bentoml.on_startup
    async def start(self) -> None:
        """Take work, and load models meanwhile."""
        self._worker.start()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """End the queue. Requests in flight have completed before (see drain.py)."""
        await self._worker.stop()
