"""The models of a process: loaded in the background, found by name, honest about what failed."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from service import metrics
from service.contract import artifact
from service.contract.store import Listing, ModelId, Store
from service.errors import CellserveError, ModelNotReady
from service.inference.model import Model, load
from service.inference.session import Runtime

logger = logging.getLogger("cellserve.models")
LOADING = "Models are being loaded. Try again in a moment."


@dataclass
class Models:
    """All versions of a store. `load_all` runs in a thread of its own; everything else may be called from any thread."""

    store: Store
    runtime: Runtime
    _listing: Listing = field(default_factory=lambda: Listing({}, {}))
    _broken: dict[str, str] = field(default_factory=dict)
    """Models whose aliases cannot be read, and why."""

    _loaded: dict[ModelId, Model] = field(default_factory=dict)
    _failed: dict[ModelId, str] = field(default_factory=dict)
    _is_done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> threading.Thread:
        """Load everything in the background."""
        thread = threading.Thread(target=self.load_all, name="cellserve-load", daemon=True)
        thread.start()
        return thread

    def load_all(self) -> None:
        """Load every version of the store, default versions first, and note why a version cannot be served."""
        try:
            versions = {name: self.store.versions(name) for name in self.store.names()}
            self._listing = Listing(versions, {name: self._aliases(name) for name in versions})
            defaults = {self._listing.resolve(name) for name in versions}
            for model_id in sorted(self._listing.ids(), key=lambda candidate: candidate not in defaults):
                self._load(model_id)
        finally:
            self._is_done.set()

    def _aliases(self, name: str) -> Mapping[str, str]:
        """Aliases of a model; where they cannot be read nobody knows what its name means, and it does not answer."""
        try:
            return self.store.aliases(name)
        except CellserveError as error:
            self._broken[name] = str(error)
            logger.exception("aliases refused", extra={"model": name, "reason": str(error)})
            return {}

    def _load(self, model_id: ModelId) -> None:
        try:
            model = load(artifact.read(self.store.path(model_id)), self.runtime)
        except Exception as error:
            # Whatever is wrong with one version must not keep the others from being served.
            self._failed[model_id] = str(error)
            metrics.MODEL_FAILED.labels(model_id.name, model_id.version).set(1)
            logger.exception("model refused", extra={"model": str(model_id), "reason": str(error)})
            return
        self._loaded[model_id] = model
        metrics.MODEL_INFO.labels(model_id.name, model_id.version, model.manifest.family, self.runtime.provider).set(1)
        shapes = {name: session.shapes for name, session in model.sessions.items()}
        logger.info("model loaded", extra={"model": model.id, "provider": self.runtime.provider, "row_shapes": shapes})

    @property
    def listing(self) -> Listing:
        """What the store held when it was read: what is loaded is served even if its files go away."""
        return self._listing

    def get(self, name: str | None) -> Model:
        """The model that `name`, `name@version` or `name@alias` means.

        Raises:
            ModelNotFound: no such model.
            ModelNotReady: it is still being loaded, or was refused.
        """
        if not self._listing.versions and not self._is_done.is_set():
            raise ModelNotReady(model=(name or "")[:140], reason=LOADING)
        model_id = self._listing.resolve(name)
        if model_id.name in self._broken:
            raise ModelNotReady(model=model_id.name, reason=self._broken[model_id.name])
        model = self._loaded.get(model_id)
        if model is None:
            raise ModelNotReady(model=str(model_id), reason=self._failed.get(model_id, LOADING))
        return model

    def loaded(self) -> Mapping[ModelId, Model]:
        """The versions that answer."""
        return dict(self._loaded)

    def problem(self) -> str | None:
        """Why this process cannot do its work yet, or None when the default version of every model answers."""
        if not self._is_done.is_set():
            return LOADING
        if not self._listing.versions:
            return f"There is no model in {self.store.root}. Export one (make export), or point CELLSERVE_STORE to a store."
        for name in self._listing.versions:
            try:
                self.get(name)
            except ModelNotReady as error:
                return str(error)
        return None

    def states(self) -> dict[str, str]:
        """Per version: ready, loading, or why it is refused."""
        return {
            str(model_id): "ready" if model_id in self._loaded else self._failed.get(model_id, "loading")
            for model_id in self._listing.ids()
        }
