"""Versions in memory: found by id, and no more than so many, of which those go first that were used the longest time ago."""

import contextlib
import ctypes
import threading
import weakref
from collections import OrderedDict
from functools import cache
from typing import Any

from service import metrics
from service.contract.store import ModelId
from service.inference.model import Model
from service.inference.profile import export_profile


class _Held:
    """Counts the models that are alive. Not by finalizers: these may run while the very locks of a metric are held."""

    def __init__(self) -> None:
        self._models: list[weakref.ref[Model]] = []
        self._lock = threading.Lock()

    def add(self, model: Model) -> None:
        """Count a model for as long as it lives."""
        with self._lock:
            self._models.append(weakref.ref(model))

    def count(self) -> float:
        """How many are alive."""
        with self._lock:
            self._models = [model for model in self._models if model() is not None]
            return len(self._models)


_held = _Held()
metrics.MODELS_HELD.set_function(_held.count)


class Loaded:
    """May be used from any thread.

    A request holds the model that it was given, so a version that leaves here lives on until the last such request has ended; then its
    sessions end with it.
    """

    def __init__(self, max_models: int | None = None) -> None:
        """Begin empty; None is no bound."""
        self._max_models = max_models
        self._models: OrderedDict[ModelId, Model] = OrderedDict()
        self._lock = threading.Lock()
        self._leaving: list[tuple[weakref.ref[Model], ModelId]] = []

    def get(self, model_id: ModelId) -> Model | None:
        """The version, which counts as used now."""
        with self._lock:
            model = self._models.get(model_id)
            if model is not None:
                self._models.move_to_end(model_id)
            return model

    def put(self, model_id: ModelId, model: Model) -> None:
        """Add a version; `trim` keeps the bound afterwards."""
        with self._lock:
            self._models[model_id] = model
        manifest = model.manifest
        _held.add(model)
        metrics.MODEL_INFO.labels(model_id.name, model_id.version, manifest.family, model.runtime.provider).set(1)
        n_bytes = sum(manifest.files[graph.file].n_bytes for graph in manifest.graphs.values())
        metrics.GRAPH_BYTES.labels(model_id.name, model_id.version).set(n_bytes)
        export_profile(manifest)

    def drop(self, model_id: ModelId, reason: str) -> None:
        """Let a version go, if it is here."""
        with self._lock:
            model = self._models.pop(model_id, None)
        if model is not None:
            if reason == "withdrawn":  # requests that still hold it write into its series until they end
                self._leaving.append((weakref.ref(model), model_id))
            manifest = model.manifest
            with contextlib.suppress(KeyError):
                metrics.MODEL_INFO.remove(model_id.name, model_id.version, manifest.family, model.runtime.provider)
            with contextlib.suppress(KeyError):
                metrics.GRAPH_BYTES.remove(model_id.name, model_id.version)
            metrics.MODEL_UNLOADS.labels(reason).inc()

    def trim(self) -> list[ModelId]:
        """Let those go that are above the bound; which they were."""
        gone = []
        while (oldest := self._oldest_above()) is not None:
            self.drop(oldest, "least_recently_used")
            gone.append(oldest)
        return gone

    def forget_ended(self) -> None:
        """Drop the series of withdrawn versions whose last request has ended. One thread at a time."""
        for ended in [leaving for leaving in self._leaving if leaving[0]() is None]:
            self._leaving.remove(ended)
            if ended[1] not in self._models:  # it may have come back
                metrics.forget(ended[1].name, ended[1].version)

    def has_room(self) -> bool:
        """Whether one more stays within the bound."""
        return self._max_models is None or len(self._models) < self._max_models

    def all(self) -> dict[ModelId, Model]:
        """What is here now; nothing counts as used by it."""
        with self._lock:
            return dict(self._models)

    def _oldest_above(self) -> ModelId | None:
        with self._lock:
            if self._max_models is None or len(self._models) <= self._max_models:
                return None
            return next(iter(self._models))


def give_back_memory() -> None:
    """Hand memory that nobody uses back to the system.

    glibc keeps what graphs and golden cells were read into, in pieces: two hundred exchanges grew a process by 50 MB without it.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """The function of that name of glibc; None where there is another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
