"""The models of a process: loaded and exchanged in the background, found by name, honest about what failed.

What requests see is one immutable listing. A change of the store is prepared beside it (read, verified, warmed up) and then put in its place
in one assignment; a request keeps the model that it began with. What cannot be served never takes the place of what can.
"""

import asyncio
import contextlib
import gc
import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from service import metrics
from service.contract import artifact
from service.contract.artifact import Artifact
from service.contract.store import DEFAULT, Listing, ModelId, Store
from service.contract.traffic import NO_TRAFFIC, Traffic, position
from service.errors import CellserveError, InvalidArtifact, ModelNotReady
from service.inference.loaded import Loaded, give_back_memory
from service.inference.model import Model, load
from service.inference.session import Runtime

logger = logging.getLogger("cellserve.models")
LOADING = "Models are being loaded. Try again in a moment."
UNPROVEN = (
    "It was not verified on this machine yet, because there was no room for it. The first request for it does that."
)
RETRY_SECONDS = 10.0
"""A version that was served before and could not be loaded again is tried no more often than this."""


@dataclass(frozen=True)
class Failure:
    """Why a version is not served."""

    reason: str
    fingerprint: Any
    """Of its files at that time: while they are the same there is no use in another attempt."""

    at: float
    """On the clock of `time.monotonic`."""


@dataclass
class Models:
    """All versions of a store. `obtain` belongs to the event loop; what loads blocks; the rest may be called from any thread."""

    store: Store
    runtime: Runtime
    max_loaded: int | None = None
    """Versions in memory at most, besides one that is being loaded and those that requests still hold; None for all."""

    _listing: Listing = field(default_factory=lambda: Listing({}, {}))
    _broken: dict[str, str] = field(default_factory=dict)
    """Models whose aliases could never be read, and why: nobody knows what their name means."""

    _problems: dict[str, str] = field(default_factory=dict)
    """By model, what the store asks for and cannot be done; under "" what is wrong with the store itself."""

    _found: list[str] = field(default_factory=list)
    """What was found wrong with the model that is being read."""

    _failed: dict[ModelId, Failure] = field(default_factory=dict)
    _proven: dict[ModelId, str] = field(default_factory=dict)
    """Versions that were verified on this machine, in memory or not, and the digest of their manifests."""

    _is_done: threading.Event = field(default_factory=threading.Event)
    _is_stopping: threading.Event = field(default_factory=threading.Event)
    _change: threading.RLock = field(default_factory=threading.RLock)
    """Held by whoever loads or exchanges; never by the event loop."""

    _loader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="cellserve-load")
    )

    def __post_init__(self) -> None:
        self._loaded = Loaded(self.max_loaded)

    def start(self, poll_seconds: float | None = None) -> threading.Thread:
        """Load everything in the background, and then look at the store every `poll_seconds`, if any."""

        def work() -> None:
            self.load_all()
            # A hundred thousand objects live from here on for as long as the process; to look through them for garbage would stop
            # all requests for as long as tens of them take.
            gc.freeze()
            while poll_seconds is not None and not self._is_stopping.wait(poll_seconds):
                self.refresh()

        thread = threading.Thread(target=work, name="cellserve-store", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """Look at the store no more."""
        self._is_stopping.set()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def load_all(self) -> None:
        """Load the store for the first time, default versions first, and note why a version cannot be served."""
        try:
            with self._change:
                versions = {name: self.store.versions(name) for name in self.store.names()}
                found, wrong = {}, {}
                for name in versions:
                    found[name] = self._read(name, Listing({}, {}))
                    wrong[name] = self._found.copy()
                    self._found.clear()
                self._listing = Listing(
                    versions,
                    {name: aliases for name, (aliases, _) in found.items()},
                    {name: traffic for name, (_, traffic) in found.items()},
                )
                for has_all in (False, True):
                    for name in versions:
                        self._load_model(name, self._listing, has_all=has_all)
                        self._loaded.trim()
                for name in versions:
                    self._found += wrong[name]
                    self._check_traffic(self._listing, name)
                    self._settle(name)
        finally:
            self._is_done.set()

    def refresh(self, is_forced: bool = False) -> None:
        """Follow the store: verify and warm up what is new, exchange what is asked for, let go what is gone. Blocks meanwhile.

        Args:
            is_forced: try versions again that were refused, even if their files are the same.
        """
        with self._change:
            self._loaded.forget_ended()
            problem = self.store.problem()
            self._settle("", problem)
            if problem is not None:
                return  # what cannot be read at this moment is not gone
            for name in sorted({*self.store.names(), *self._listing.versions}):
                try:
                    self._refresh_model(name, is_forced)
                except Exception as error:
                    # Whatever is wrong with one model must not keep the others from being exchanged.
                    self._found.append(f"{type(error).__name__}: {error}")
                self._settle(name)

    def _refresh_model(self, name: str, is_forced: bool) -> None:
        before, versions = self._listing, self.store.versions(name)
        if not versions:
            if self.store.has(name):
                self._found.append(
                    "No version of it can be found in the store any more; what was served before still is."
                )
            else:
                self._exchange(name, _without(before, name))
            return
        aliases, traffic = self._read(name, before)
        # What an alias means from memory stays, even where its files are gone.
        kept = tuple(
            version for version in before.versions.get(name, ()) if version in set(aliases.values()) - {*versions}
        )
        wanted = replace(
            before,
            versions={**before.versions, name: (*kept, *versions)},
            aliases={**before.aliases, name: aliases},
            traffic={**before.traffic, name: traffic},
        )
        self._load_model(name, wanted, is_quiet=True, is_forced=is_forced)
        served = self._served(name, before, wanted)
        self._check_traffic(served, name)
        self._exchange(name, served)

    def _read(self, name: str, before: Listing) -> tuple[Mapping[str, str], Traffic]:
        """Aliases and traffic of a model; where they cannot be read, what they were before."""
        aliases, traffic = before.aliases.get(name, {}), before.traffic.get(name, NO_TRAFFIC)
        has_good = name in before.versions and name not in self._broken
        try:
            aliases = self.store.aliases(name)
            self._broken.pop(name, None)
        except CellserveError as error:
            self._found.append(str(error))
            if not has_good:
                self._broken[name] = str(error)
            return aliases, traffic
        try:
            traffic = self.store.traffic(name)
        except CellserveError as error:
            self._found.append(str(error))
        return aliases, traffic

    def _load_model(
        self, name: str, listing: Listing, is_quiet: bool = False, is_forced: bool = False, has_all: bool = True
    ) -> None:
        """Load those versions of a model that are asked for and, if all, while there is room the others, too."""
        aliases = listing.aliases[name]
        asked = [listing.resolve(name).version, *aliases.values()]
        asked += [aliases.get(target, target) for target in listing.traffic[name].targets()]
        versions = listing.versions[name]
        for version in sorted(versions, key=lambda version: asked.index(version) if version in asked else len(asked)):
            model_id = ModelId(name, version)
            failure = self._failed.get(model_id)
            if failure is None and model_id in self._proven:
                continue
            if failure is not None and not is_forced and failure.fingerprint == self.store.fingerprint(model_id):
                continue
            if version in asked or (has_all and self._loaded.has_room()):
                self._load(model_id, is_quiet)

    def _served(self, name: str, before: Listing, wanted: Listing) -> Listing:
        """The listing that is wanted, but where an alias or the name itself would come to mean what cannot answer, it means what it did."""
        old = dict(before.aliases.get(name, {}))
        if name in before.versions:
            old[DEFAULT] = before.resolve(name).version
        aliases, versions = dict(wanted.aliases[name]), wanted.versions[name]
        for alias, version in {DEFAULT: versions[-1], **aliases}.items():
            good = old.get(alias)
            if good in (None, version) or self._is_usable(ModelId(name, version)):
                continue
            if good is not None and self._is_usable(ModelId(name, good)):
                aliases[alias] = good
                versions = versions if good in versions else (good, *versions)
                reason = self._failed[ModelId(name, version)].reason
                self._found.append(
                    f"'{alias}' would be {name}@{version}, which is refused; it still is {name}@{good}. {reason}"
                )
        return replace(wanted, versions={**wanted.versions, name: versions}, aliases={**wanted.aliases, name: aliases})

    def _exchange(self, name: str, listing: Listing) -> None:
        """Put a listing in the place of the one that is served, and let go what it does not have."""
        before, self._listing = self._listing, listing
        if (old := _meaning(before, name)) != (new := _meaning(listing, name)) and old:
            metrics.MODEL_SWAPS.labels(name).inc()
            logger.info("model exchanged", extra={"model": name, "before": old, "after": new})
        for version in set(before.versions.get(name, ())) - set(listing.versions.get(name, ())):
            model_id = ModelId(name, version)
            self._loaded.drop(model_id, "withdrawn")
            self._proven.pop(model_id, None)
            self._forgive(model_id)
            logger.info("model withdrawn", extra={"model": str(model_id)})
        if name not in listing.versions:
            self._broken.pop(name, None)
        for version in reversed(_meaning(listing, name).values()):
            self._loaded.get(ModelId(name, version))  # what has just become something counts as used
        self._loaded.trim()

    def _check_traffic(self, listing: Listing, name: str) -> None:
        for target in listing.traffic[name].targets():
            if self._target(listing, name, target) is None:
                self._found.append(f"traffic.json names '{target}', which cannot be served; nothing goes there.")

    def _settle(self, name: str, problem: str | None = None) -> None:
        """Say what was found wrong with a model since the last call, if that is news."""
        problem = problem or " ".join(self._found) or None
        self._found.clear()
        if problem == self._problems.get(name):
            return
        metrics.STORE_PROBLEM.labels(name).set(problem is not None)
        if problem is None:
            del self._problems[name]
            logger.info("the store is followed again", extra={"model": name})
        else:
            self._problems[name] = problem
            logger.error("the store cannot be followed", extra={"model": name, "reason": problem})

    def _load(self, model_id: ModelId, is_quiet: bool) -> Model | None:
        """Read, verify and warm up a version; None where it is refused."""
        started, path = time.monotonic(), self.store.path(model_id)
        fingerprint = self.store.fingerprint(model_id)
        try:
            content = artifact.read(path)
            digest = _digest(content, self._proven.get(model_id))
            model = load(content, self.runtime, is_quiet)
        except Exception as error:
            # Whatever is wrong with one version must not keep the others from being served.
            self._failed[model_id] = Failure(str(error), fingerprint, time.monotonic())
            metrics.MODEL_FAILED.labels(model_id.name, model_id.version).set(1)
            metrics.MODEL_LOADS.labels("refused").inc()
            logger.exception("model refused", extra={"model": str(model_id), "reason": str(error)})
            return None
        self._forgive(model_id)
        self._proven[model_id] = digest
        self._loaded.put(model_id, model)
        metrics.MODEL_LOADS.labels("loaded").inc()
        metrics.MODEL_LOAD_SECONDS.observe(time.monotonic() - started)
        if is_quiet:
            give_back_memory()
        shapes = {name: session.shapes for name, session in model.sessions.items()}
        logger.info("model loaded", extra={"model": model.id, "provider": self.runtime.provider, "row_shapes": shapes})
        return model

    def _forgive(self, model_id: ModelId) -> None:
        if self._failed.pop(model_id, None) is not None:
            with contextlib.suppress(KeyError):
                metrics.MODEL_FAILED.remove(model_id.name, model_id.version)

    @property
    def listing(self) -> Listing:
        """What is served: the store as it was read, as far as it can be followed. It stays even if the files go away."""
        return self._listing

    def choose(self, name: str | None, request_id: str | None = None) -> ModelId:
        """The version that `name`, `name@version` or `name@alias` means for a request.

        Args:
            name: None where there is one model only.
            request_id: where it is given and only the model is named, the model's split decides by it.

        Raises:
            ModelNotFound: no such model.
            ModelNotReady: the store has not been read yet, or nobody knows what the name means.
        """
        listing = self._listing
        if not listing.versions and not self._is_done.is_set():
            raise ModelNotReady(model=(name or "")[:140], reason=LOADING)
        model_id = listing.resolve(name)
        if model_id.name in self._broken:
            raise ModelNotReady(model=model_id.name, reason=self._broken[model_id.name])
        split = listing.traffic.get(model_id.name, NO_TRAFFIC).split
        if split is not None and request_id is not None and "@" not in (name or ""):
            target = self._target(listing, model_id.name, split.to)
            if target is not None and position(model_id.name, request_id) < split.share:
                return target
        return model_id

    def shadow_of(self, model: Model) -> ModelId | None:
        """The version that shall compute the same answers, where there is one that can."""
        listing, name = self._listing, model.manifest.name
        wanted = listing.traffic.get(name, NO_TRAFFIC).shadow
        target = self._target(listing, name, wanted) if wanted is not None else None
        return target if str(target) != model.id else None

    def _target(self, listing: Listing, name: str, target: str) -> ModelId | None:
        version = listing.aliases.get(name, {}).get(target, target)
        model_id = ModelId(name, version)
        return model_id if version in listing.versions.get(name, ()) and self._is_usable(model_id) else None

    def _is_usable(self, model_id: ModelId) -> bool:
        """Whether the version was verified here and nothing has been found against it since."""
        return model_id in self._proven and model_id not in self._failed

    def get(self, name: str | None) -> Model:
        """The model that a name means, if it is in memory. Raises as `obtain`."""
        model_id = self.choose(name)
        model = self._loaded.get(model_id)
        if model is None:
            failure = self._failed.get(model_id)
            raise ModelNotReady(model=str(model_id), reason=failure.reason if failure else LOADING)
        return model

    async def obtain(
        self, name: str | None, request_id: str | None = None, limit_seconds: float | None = None
    ) -> Model:
        """The model that a name means for a request (see `choose`), loaded for it where it was unloaded.

        Raises:
            ModelNotFound: no such model.
            ModelNotReady: it is still being loaded for the first time, or was refused.
            TimeoutError: it could not be loaded within `limit_seconds`.
        """
        model_id = self.choose(name, request_id)
        model = self._loaded.get(model_id)
        if model is not None:
            return model
        failure = self._failed.get(model_id)
        if failure is not None:
            if model_id not in self._proven or time.monotonic() - failure.at < RETRY_SECONDS:
                raise ModelNotReady(model=str(model_id), reason=failure.reason)
        elif not self._is_done.is_set():
            raise ModelNotReady(model=str(model_id), reason=LOADING)
        async with asyncio.timeout(limit_seconds):
            return await asyncio.get_running_loop().run_in_executor(self._loader, self.load_now, model_id)

    def load_now(self, model_id: ModelId) -> Model:
        """A version, loaded if it is not in memory; blocks meanwhile.

        Raises:
            ModelNotFound: it was withdrawn.
            ModelNotReady: it is refused.
        """
        with self._change:
            model = self._loaded.get(model_id)
            if model is not None:
                return model
            self._listing.resolve(str(model_id))
            model = self._load(model_id, is_quiet=True)
            self._loaded.trim()
            if model is None:
                raise ModelNotReady(model=str(model_id), reason=self._failed[model_id].reason)
            return model

    def loaded(self) -> Mapping[ModelId, Model]:
        """The versions in memory that are listed, in the order of the listing."""
        held = self._loaded.all()
        return {model_id: held[model_id] for model_id in self._listing.ids() if model_id in held}

    def problem(self) -> str | None:
        """Why this process cannot do its work yet, or None when the default version of every model can answer."""
        if not self._is_done.is_set():
            return LOADING
        if not self._listing.versions:
            return f"There is no model in {self.store.root}. Export one (make export), or point CELLSERVE_STORE to a store."
        return next((reason for name in self._listing.versions if (reason := self.problem_of(name))), None)

    def problem_of(self, name: str) -> str | None:
        """Why what a name means cannot answer; None where it can, if need be after it was loaded again.

        Raises:
            ModelNotFound: no such model.
        """
        try:
            model_id = self.choose(name)
        except ModelNotReady as error:
            return str(error)
        if self._is_usable(model_id):
            return None
        failure = self._failed.get(model_id)
        reason = failure.reason if failure else UNPROVEN if self._is_done.is_set() else LOADING
        return str(ModelNotReady(model=str(model_id), reason=reason))

    def problems(self) -> dict[str, str]:
        """By model, what the store asks for and cannot be done; under "" what is wrong with the store itself."""
        return dict(self._problems)

    def states(self) -> dict[str, str]:
        """Per version: ready, unloaded (and loaded again when it is asked for), loading, or why it is refused."""
        loaded = self._loaded.all()
        return {str(model_id): self._state(model_id, model_id in loaded) for model_id in self._listing.ids()}

    def _state(self, model_id: ModelId, is_loaded: bool) -> str:
        if is_loaded:
            return "ready"
        if failure := self._failed.get(model_id):
            return failure.reason
        return "unloaded" if self._is_done.is_set() else "loading"


def _digest(content: Artifact, before: str | None) -> str:
    """The digest of a manifest, and with it of all files.

    Raises:
        InvalidArtifact: it is not the one before.
    """
    digest = hashlib.sha256(content.manifest.model_dump_json().encode()).hexdigest()
    if before not in (None, digest):
        problem = "it is another one than was served under this name; a version never changes"
        raise InvalidArtifact(path=str(content.path), problem=problem)
    return digest


def _without(listing: Listing, name: str) -> Listing:
    """The listing less one model."""
    return Listing(
        {other: value for other, value in listing.versions.items() if other != name},
        {other: value for other, value in listing.aliases.items() if other != name},
        {other: value for other, value in listing.traffic.items() if other != name},
    )


def _meaning(listing: Listing, name: str) -> dict[str, str]:
    """Version by alias, that of the name itself included; empty where there is no such model."""
    if name not in listing.versions:
        return {}
    return {DEFAULT: listing.resolve(name).version, **listing.aliases[name]}
