"""models_store: which models, versions and aliases there are. Names are looked up in a listing and never joined to a path unchecked."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.contract import artifact, strict_json, traffic
from service.contract.traffic import MAX_TRAFFIC_BYTES, NO_TRAFFIC, TRAFFIC, Traffic
from service.errors import InvalidArtifact, ModelNotFound

ALIASES = "aliases.json"
DEFAULT = "default"
MAX_ALIASES_BYTES = 2**20
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class ModelId:
    """A model's name and one of its versions."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Listing:
    """What a store held at one moment: names, versions and aliases, resolved without looking at the disk again."""

    versions: Mapping[str, tuple[str, ...]]
    """Versions by name, sorted, numbers by value; at least one each."""

    aliases: Mapping[str, Mapping[str, str]]
    """Version by alias, by name."""

    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    """Of the models that have a traffic.json, by name."""

    def ids(self) -> tuple[ModelId, ...]:
        """Every version of every model."""
        return tuple(ModelId(name, version) for name, versions in self.versions.items() for version in versions)

    def resolve(self, model: str | None = None) -> ModelId:
        """Find the version that `model` means.

        Args:
            model: `name`, `name@version`, `name@alias`; None where there is one model only.

        Raises:
            ModelNotFound: no such name, version or alias.
        """
        if model is None:
            if len(self.versions) != 1:
                raise self._not_found("")
            model = next(iter(self.versions))
        name, _, wanted = model.partition("@")
        aliases = self.aliases.get(name, {})
        if name in self.versions:
            wanted = wanted or aliases.get(DEFAULT, self.versions[name][-1])
            wanted = aliases.get(wanted, wanted)
        if wanted not in self.versions.get(name, ()):
            raise self._not_found(model[:140])
        return ModelId(name, wanted)

    def _not_found(self, model: str) -> ModelNotFound:
        return ModelNotFound(model=model, available=", ".join(map(str, self.ids())) or "none")


@dataclass(frozen=True)
class Store:
    """A directory of models: <root>/<name>/<version>/ and <root>/<name>/aliases.json."""

    root: Path

    def names(self) -> tuple[str, ...]:
        """Names of the models that have at least one version, sorted."""
        return tuple(name for name in _listing(self.root, _NAME) if self.versions(name))

    def versions(self, name: str) -> tuple[str, ...]:
        """Versions of a model, sorted, numbers by value."""
        if not _NAME.fullmatch(name):
            return ()
        return tuple(sorted(_listing(self.root / name, _VERSION), key=_natural))

    def aliases(self, name: str) -> dict[str, str]:
        """Version by alias.

        Raises:
            InvalidArtifact: aliases.json is not an object of existing versions.
        """
        path = self.root / name / ALIASES
        if not _NAME.fullmatch(name) or not os.path.lexists(path):
            return {}
        try:
            aliases = strict_json.loads(artifact.read_regular(path, MAX_ALIASES_BYTES))
        except ValueError as error:
            raise InvalidArtifact(path=str(path), problem=str(error)) from None
        versions = self.versions(name)
        if not isinstance(aliases, dict):
            raise InvalidArtifact(path=str(path), problem="must be an object of alias: version")
        for alias, version in aliases.items():
            if not _NAME.fullmatch(alias) or alias in versions:
                raise InvalidArtifact(path=str(path), problem=f"{alias!r} cannot be an alias")
            if version not in versions:
                raise InvalidArtifact(path=str(path), problem=f"{alias!r} points to {version!r}, which is no version")
        return dict(aliases)

    def traffic(self, name: str) -> Traffic:
        """What traffic.json says; nothing where there is none.

        Raises:
            InvalidArtifact: it is not as documented, or names what is neither version nor alias.
        """
        path = self.root / name / TRAFFIC
        if not _NAME.fullmatch(name) or not os.path.lexists(path):
            return NO_TRAFFIC
        try:
            found = traffic.parse(strict_json.loads(artifact.read_regular(path, MAX_TRAFFIC_BYTES)))
        except ValueError as error:
            raise InvalidArtifact(path=str(path), problem=str(error)) from None
        known = {*self.versions(name), *self.aliases(name)}
        if unknown := next((target for target in found.targets() if target not in known), None):
            raise InvalidArtifact(path=str(path), problem=f"{unknown!r} is neither a version nor an alias")
        return found

    def problem(self) -> str | None:
        """Why the store cannot be read at this moment; None where it can."""
        try:
            next(self.root.iterdir(), None)
        except OSError as error:
            return f"{self.root} cannot be read ({error.strerror})"
        return None

    def has(self, name: str) -> bool:
        """Whether the model's directory is there, readable or not."""
        return os.path.lexists(self.root / name)

    def fingerprint(self, model: ModelId) -> tuple[tuple[str, int, int, int], ...]:
        """Changes when a file of the version does: names, sizes, times and inodes, without reading any."""
        found = []
        for folder, _, files in os.walk(self.path(model)):
            for name in files:
                path = Path(folder) / name
                try:
                    about = path.lstat()
                except OSError:
                    continue  # it went away meanwhile, which is a change by itself
                found.append((str(path), about.st_ino, about.st_size, about.st_mtime_ns))
        return tuple(sorted(found))

    def listing(self) -> Listing:
        """Everything that the store holds now.

        Raises:
            InvalidArtifact: an aliases.json is not an object of existing versions.
        """
        names = self.names()
        return Listing(
            versions={name: self.versions(name) for name in names}, aliases={name: self.aliases(name) for name in names}
        )

    def ids(self) -> tuple[ModelId, ...]:
        """Every version of every model."""
        return tuple(ModelId(name, version) for name in self.names() for version in self.versions(name))

    def resolve(self, model: str | None = None) -> ModelId:
        """Find the version that `model` means now, as `Listing.resolve`."""
        return self.listing().resolve(model)

    def path(self, model: ModelId) -> Path:
        """The version directory."""
        return self.root / model.name / model.version

    def set_alias(self, model: ModelId, alias: str = DEFAULT) -> None:
        """Let `alias` mean this version, from one moment to the next.

        Raises:
            ModelNotFound: the version is not in the store.
            ValueError: `alias` is no usable name.
        """
        if model.version not in self.versions(model.name):
            raise ModelNotFound(model=str(model), available=", ".join(map(str, self.ids())) or "none")
        if not _NAME.fullmatch(alias) or alias in self.versions(model.name):
            raise ValueError(f"{alias!r} cannot be an alias")
        aliases = {**self.aliases(model.name), alias: model.version}
        content = json.dumps(aliases, indent=2, sort_keys=True).encode() + b"\n"
        artifact.write_atomically(self.root / model.name / ALIASES, content)

    def set_traffic(self, name: str, wanted: Traffic) -> None:
        """Let traffic.json say this, from one moment to the next.

        Raises:
            ModelNotFound: there is no such model, or it has no such version or alias.
        """
        self.resolve(name)
        for target in wanted.targets():
            self.resolve(f"{name}@{target}")
        content = json.dumps(wanted.model_dump(exclude_none=True), indent=2, sort_keys=True).encode() + b"\n"
        artifact.write_atomically(self.root / name / TRAFFIC, content)


def _listing(path: Path, pattern: re.Pattern[str]) -> list[str]:
    try:
        entries = sorted(path.iterdir())
    except OSError:
        return []
    return [
        entry.name for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
    ]


def _natural(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which "10" comes after "9"."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", version) if part)
