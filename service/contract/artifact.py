"""One version directory: read and verified whole, or written and renamed into place."""

import hashlib
import io
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from service.contract import ambiguous_names, onnx_file, strict_json
from service.contract.ambiguous_names import Ambiguous
from service.contract.gene_table import GeneTable
from service.contract.manifest import SCHEMA_VERSION, File, Manifest
from service.contract.reference_cells import ReferenceCells
from service.errors import InvalidArtifact, VersionExists

MANIFEST = "manifest.json"
CARD, PAGE = "README.md", "card.html"
TEMPORARY_PREFIX = ".tmp-"
LEFTOVER_SECONDS = 3600
MAX_MANIFEST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Artifact:
    """A verified version, wholly in memory: what is served is what was checked, whatever happens to the files afterwards."""

    path: Path
    manifest: Manifest
    genes: GeneTable
    contents: Mapping[str, bytes]
    """Bytes of every file but manifest.json, by name."""

    reference: ReferenceCells | None = None
    ambiguous_names: Mapping[str, Ambiguous] = field(default_factory=dict)
    """Names that are not taken for a gene of the model, with the reason."""

    def graph(self, name: str) -> bytes:
        """The ONNX bytes of the graph `name` of the manifest."""
        return self.contents[self.manifest.graphs[name].file]  # type: ignore[index]

    @property
    def card(self) -> str:
        """The model card, Markdown; empty if there is none."""
        return self.contents.get(CARD, b"").decode("utf-8", errors="replace")

    @property
    def page(self) -> str:
        """The model card as a page, HTML; empty if there is none."""
        return self.contents.get(PAGE, b"").decode("utf-8", errors="replace")

    def golden(self) -> dict[str, NDArray[np.float32]]:
        """The arrays of the golden file."""
        with np.load(io.BytesIO(self.contents[self.manifest.golden.file]), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def describe(contents: Mapping[str, bytes]) -> dict[str, File]:
    """The manifest's `files` for these contents."""
    return {
        name: File(sha256=hashlib.sha256(content).hexdigest(), n_bytes=len(content))
        for name, content in sorted(contents.items())
    }


def read_manifest(path: Path) -> Manifest:
    """Read manifest.json of a version directory, without looking at the other files.

    Raises:
        InvalidArtifact: absent, too large, not JSON, of a newer schema_version, or not as the schema says.
    """
    file = path / MANIFEST
    content = read_regular(file, MAX_MANIFEST_BYTES)
    try:
        document = strict_json.loads(content)
    except ValueError as error:
        raise InvalidArtifact(path=str(file), problem=f"not valid JSON: {error}") from None
    found = document.get("schema_version") if isinstance(document, dict) else None
    if type(found) is not int or found != SCHEMA_VERSION:  # 1.0 and true equal 1
        raise InvalidArtifact(
            path=str(file), problem=f"schema_version is {found!r}, this program reads {SCHEMA_VERSION}"
        )
    try:
        # Strict JSON mode: "1" is not 1, and no value is converted in silence.
        manifest = Manifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InvalidArtifact(path=str(file), problem=f"{where}: {first['msg']}{more}") from None
    if (manifest.name, manifest.version) != (path.parent.name, path.name):
        raise InvalidArtifact(
            path=str(file), problem=f"says it is {manifest.id}, but lies in {path.parent.name}/{path.name}"
        )
    return manifest


def read(path: Path) -> Artifact:
    """Read and verify a version directory.

    Raises:
        InvalidArtifact: anything missing, extra, changed, linked, or not as the manifest says. Nothing outside `path` is read.
    """
    manifest = read_manifest(path)
    present = set(_files_below(path))
    if missing := sorted(set(manifest.files) - present):
        raise InvalidArtifact(path=str(path), problem=f"the manifest lists {missing[0]}, which is not there")
    if extra := sorted(present - set(manifest.files) - {MANIFEST}):
        raise InvalidArtifact(path=str(path), problem=f"{extra[0]} is not in the manifest")
    contents = {}
    for name, file in manifest.files.items():
        content = read_regular(path / name, file.n_bytes)
        if len(content) != file.n_bytes or hashlib.sha256(content).hexdigest() != file.sha256:
            raise InvalidArtifact(
                path=str(path / name), problem="its bytes are not those that the manifest's sha256 was taken of"
            )
        contents[name] = content
    for graph in manifest.graphs.values():
        onnx_file.check(path / graph.file, contents[graph.file])
    try:
        genes = GeneTable.parse(contents[manifest.genes.file])
    except ValueError as error:
        raise InvalidArtifact(path=str(path / manifest.genes.file), problem=str(error)) from None
    if len(genes) != manifest.genes.n_genes or genes.digest != manifest.genes.digest:
        raise InvalidArtifact(
            path=str(path / manifest.genes.file), problem="its genes are not those of the manifest's n_genes and digest"
        )
    try:
        reference = ReferenceCells.parse(manifest, contents) if manifest.reference is not None else None
    except ValueError as error:
        raise InvalidArtifact(path=str(path), problem=f"its reference cells: {error}") from None
    return Artifact(path, manifest, genes, contents, reference, _ambiguous_names(path, manifest, contents))


def _ambiguous_names(path: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> dict[str, Ambiguous]:
    name = manifest.genes.ambiguous_names
    if name is None:
        return {}
    try:
        return ambiguous_names.parse(contents[name])
    except ValueError as error:
        raise InvalidArtifact(path=str(path / name), problem=str(error)) from None


def write(root: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Path:
    """Write a version under `root`/<name>/<version>, visible only when it is whole.

    Args:
        root: the models_store.
        manifest: complete; its `files` must describe `contents`.
        contents: bytes of every file but manifest.json, by name.

    Returns:
        The version directory.

    Raises:
        VersionExists: that version is already there.
        InvalidArtifact: what was written does not read back.
    """
    target = root / manifest.name / manifest.version
    if target.exists():
        raise VersionExists(path=str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent)
    # The directory that is renamed carries the version's name already, so that it is read back under the very rules of serving.
    holder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
    staged = holder / manifest.name / manifest.version
    try:
        staged.mkdir(parents=True)
        document = manifest.model_dump_json(indent=2).encode() + b"\n"
        for name, content in {**contents, MANIFEST: document}.items():
            (staged / name).parent.mkdir(exist_ok=True)
            _write_flushed(staged / name, content)
        read(staged)
        _flush_directory(staged)
        try:
            staged.rename(target)
        except OSError:
            if target.exists():
                raise VersionExists(path=str(target)) from None
            raise
        _flush_directory(target.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
    return target


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old bytes or the new ones."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        _write_flushed(temporary, content)
        temporary.chmod(0o644)
        temporary.replace(path)
        _flush_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """At most `max_bytes` + 1 bytes of a regular file; links, devices and pipes are refused unopened."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise InvalidArtifact(path=str(path), problem="not a regular file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise InvalidArtifact(path=str(path), problem=f"cannot be read ({error.strerror})") from None
    if len(content) > max_bytes:
        raise InvalidArtifact(path=str(path), problem=f"larger than the {max_bytes:,} bytes expected")
    return content


def _files_below(path: Path) -> list[str]:
    """Names relative to `path`; folders are entered one level deep, which is what the format has."""
    names = []
    try:
        for entry in path.iterdir():
            if stat.S_ISDIR(entry.lstat().st_mode):
                names += [f"{entry.name}/{inner.name}" for inner in entry.iterdir()]
            else:
                names.append(entry.name)
    except OSError as error:
        raise InvalidArtifact(path=str(path), problem=f"cannot be listed ({error.strerror})") from None
    return names


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Remove what a killed writer left behind; what is young may be another writer's, at work."""
    for leftover in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if time.time() - leftover.lstat().st_mtime < LEFTOVER_SECONDS:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
