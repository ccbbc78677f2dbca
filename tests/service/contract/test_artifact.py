"""Artifacts: written whole or not at all, read only if nothing about them is wrong."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from service.contract import artifact, onnx_file
from service.contract.manifest import Manifest
from service.contract.store import ModelId, Store
from service.errors import InvalidArtifact, VersionExists
from tests import builders


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A version directory that is right."""
    return builders.write_artifact(tmp_path / "store")


def change_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


def test_read_gives_what_was_written(path: Path) -> None:
    """Every byte, the genes and the golden arrays come back."""
    document, contents = builders.parts()
    read = artifact.read(path)

    assert read.contents == contents
    assert read.manifest == Manifest.model_validate(document)
    assert read.genes.gene_symbol == builders.gene_table().gene_symbol
    assert read.golden()["encode/counts"].shape == (9, builders.N_GENES)
    assert read.card.startswith("# tiny")


FILES = ["manifest.json", *builders.parts()[1]]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", ["flip", "truncate", "append", "empty", "remove", "link", "pipe", "folder"])
def test_every_file_every_way(path: Path, tmp_path: Path, name: str, spoil: str) -> None:
    """Changed, cut, longer, empty, missing, or not a regular file: refused, and the file is named."""
    file = path / name
    content = bytearray(file.read_bytes())
    if spoil == "flip":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    elif spoil == "truncate":
        file.write_bytes(content[:-2])  # its last byte may be a line break only
    elif spoil == "append":
        file.write_bytes(bytes(content) + b"x")
    elif spoil == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if spoil == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            file.symlink_to(tmp_path / "elsewhere")
        elif spoil == "pipe":
            os.mkfifo(file)
        elif spoil == "folder":
            file.mkdir()
    with pytest.raises(InvalidArtifact) as refused:
        artifact.read(path)

    assert name in str(refused.value)


def test_extra_files(path: Path) -> None:
    """A file that the manifest does not list is refused."""
    (path / "extra.onnx").write_bytes(b"")
    with pytest.raises(InvalidArtifact, match=r"extra\.onnx is not in the manifest"):
        artifact.read(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_single_byte(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whichever byte of whichever file but the manifest is changed, the version is refused."""
    path = builders.write_artifact(tmp_path_factory.mktemp("store"))
    name = data.draw(st.sampled_from(FILES[1:]))
    content = bytearray((path / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (path / name).write_bytes(content)
    with pytest.raises(InvalidArtifact):
        artifact.read(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.update(schema_version=2), "schema_version is 2"),
        (lambda d: d.update(schema_version="1"), "schema_version is '1'"),
        (lambda d: d.update(n_latent="5"), "n_latent"),
        (lambda d: d.update(n_latent=0), "n_latent"),
        (lambda d: d.pop("golden"), "golden"),
        (lambda d: d.update(name="other"), "other@1"),
        (lambda d: d.update(version="2"), "tiny@2"),
        (lambda d: d["genes"].update(file="../genes.tsv"), "genes.file"),
        (lambda d: d["genes"].update(file="/etc/passwd"), "genes.file"),
        (lambda d: d["genes"].update(digest="0" * 64), "digest"),
        (lambda d: d["genes"].update(n_genes=41), "n_genes"),
        (lambda d: d["graphs"].pop("encode"), "encode"),
        (lambda d: d["graphs"].update(steal=d["graphs"]["encode"]), "graphs"),
        (lambda d: d["files"].pop("encode.onnx"), "encode.onnx"),
        (lambda d: d["batch"].update(decode_default="three"), "three"),
        (lambda d: d["labels"][0]["classes"].append("more"), "classes"),
        (lambda d: d["labels"][0].update(name="tissue"), "probabilities_tissue"),
        (lambda d: d["golden"]["tolerance"].update({"encode/latent": float("nan")}), "NaN"),
    ],
)
def test_wrong_manifests(path: Path, change: Callable[[dict[str, Any]], Any], found: str) -> None:
    """A manifest that says anything that is not documented or not so is refused, and the place is named."""
    change_manifest(path, change)
    with pytest.raises(InvalidArtifact, match=found):
        artifact.read(path)


def test_a_key_twice(path: Path) -> None:
    """Two readers would pick different ones of two equal keys."""
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"family"', '"family": "a", "family"', 1))
    with pytest.raises(InvalidArtifact, match="'family' occurs twice"):
        artifact.read(path)


def test_a_huge_manifest(path: Path) -> None:
    """A manifest beyond every sensible size is not even parsed."""
    (path / "manifest.json").write_bytes(b" " * (artifact.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(InvalidArtifact, match="larger than"):
        artifact.read(path)


def test_a_version_is_immutable(path: Path, tmp_path: Path) -> None:
    """Writing a version that is there is refused and changes nothing."""
    before = (path / "manifest.json").stat().st_mtime_ns
    with pytest.raises(VersionExists):
        builders.write_artifact(tmp_path / "store", seed=3)

    assert (path / "manifest.json").stat().st_mtime_ns == before


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails half-way no version is visible, and what is left is removed with the next one."""

    def full(path: Path, content: bytes) -> None:
        if path.name == "golden.npz":
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr(artifact, "_write_flushed", full)
        with pytest.raises(OSError, match="No space"):
            builders.write_artifact(tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []
    (tmp_path / "tiny/.tmp-killed").mkdir()
    os.utime(tmp_path / "tiny/.tmp-killed", (0, 0))
    builders.write_artifact(tmp_path)
    assert [entry.name for entry in (tmp_path / "tiny").iterdir()] == ["1"]


def test_what_does_not_read_back_is_not_written(tmp_path: Path) -> None:
    """A manifest whose digests are not those of the contents never becomes a version."""
    document, contents = builders.parts()
    contents["README.md"] += b"changed"
    with pytest.raises(InvalidArtifact, match=r"README\.md"):
        artifact.write(tmp_path, Manifest.model_validate(document), contents)

    assert list((tmp_path / "tiny").iterdir()) == []


@pytest.mark.parametrize(
    "extra", ["reference/more.npy", "reference/deep/more.npy", ".hidden", "encode.onnx.bak", "a/b"]
)
def test_extra_files_in_folders(path: Path, extra: str) -> None:
    """A file too many is found in folders, in folders of folders, and when it is hidden."""
    (path / extra).parent.mkdir(parents=True, exist_ok=True)
    (path / extra).write_bytes(b"")
    with pytest.raises(InvalidArtifact, match="is not in the manifest"):
        artifact.read(path)


def test_files_of_a_reference(tmp_path: Path) -> None:
    """Files below reference/ belong to a version; the folder may not be a link."""
    path = builders.write_artifact(tmp_path / "store")
    assert artifact.read(path).contents["reference/latent.npy"][:6] == b"\x93NUMPY"

    (path / "reference").rename(tmp_path / "elsewhere")
    (path / "reference").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArtifact, match="reference"):
        artifact.read(path)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty"])
def test_what_is_no_directory(tmp_path: Path, kind: str) -> None:
    """A version that is not there, a file, or a folder without a manifest is refused, not a crash."""
    if kind == "file":
        (tmp_path / "1").write_bytes(b"")
    elif kind == "empty":
        (tmp_path / "1").mkdir()
    with pytest.raises(InvalidArtifact, match=r"manifest\.json: cannot be read"):
        artifact.read(tmp_path / "1")


def test_a_version_that_was_copied(path: Path) -> None:
    """A directory under another name is not the version that it says it is."""
    for name in ("2", "1.bak"):
        path.rename(path.with_name(name))
        with pytest.raises(InvalidArtifact, match=f"says it is tiny@1, but lies in tiny/{re.escape(name)}"):
            artifact.read(path.with_name(name))
        path.with_name(name).rename(path)


def test_golden_arrays_cannot_hold_code(tmp_path: Path) -> None:
    """Pickled objects in the golden file are never loaded."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    document, contents = builders.parts()
    buffer = io.BytesIO()
    np.savez(buffer, evil=np.array([Payload()], dtype=object))
    contents["golden.npz"] = buffer.getvalue()
    document["files"] = {name: entry.model_dump() for name, entry in artifact.describe(contents).items()}
    read = artifact.read(artifact.write(tmp_path, Manifest.model_validate(document), contents))
    with pytest.raises(ValueError, match="pickle"):
        read.golden()
    assert not (tmp_path / "ran").exists()


def test_what_was_read_is_what_was_checked(path: Path) -> None:
    """A version is wholly in memory: files that change or go afterwards change nothing."""
    read = artifact.read(path)
    before = read.graph("encode")
    shutil.rmtree(path)
    assert read.graph("encode") == before
    assert read.golden()
    assert read.card


def test_the_second_of_two_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When two write one version at a time the first is kept whole, the second is refused, and nothing is left over."""
    write_flushed = artifact._write_flushed

    def first_another(path: Path, content: bytes) -> None:
        monkeypatch.setattr(artifact, "_write_flushed", write_flushed)
        builders.write_artifact(tmp_path, seed=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(path, content)

    monkeypatch.setattr(artifact, "_write_flushed", first_another)
    with pytest.raises(VersionExists):
        builders.write_artifact(tmp_path, seed=2)

    assert [entry.name for entry in (tmp_path / "tiny").iterdir()] == ["1"]
    assert artifact.read(tmp_path / "tiny/1").manifest.provenance.seed == 1


def test_two_versions_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes one version does not remove what another is still writing."""
    write_flushed = artifact._write_flushed

    def first_another(path: Path, content: bytes) -> None:
        monkeypatch.setattr(artifact, "_write_flushed", write_flushed)
        builders.write_artifact(tmp_path, version="2")
        write_flushed(path, content)

    monkeypatch.setattr(artifact, "_write_flushed", first_another)
    builders.write_artifact(tmp_path, version="1")

    assert Store(tmp_path).versions("tiny") == ("1", "2")


def test_nothing_is_visible_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step of a write the store shows no version, and then the whole one."""
    seen = []
    write_flushed = artifact._write_flushed

    def watched(path: Path, content: bytes) -> None:
        seen.append(Store(tmp_path).ids())
        write_flushed(path, content)
        seen.append(Store(tmp_path).ids())

    monkeypatch.setattr(artifact, "_write_flushed", watched)
    builders.write_artifact(tmp_path)

    assert len(seen) == 2 * len(FILES)
    assert set(seen) == {()}
    assert Store(tmp_path).ids() == (ModelId("tiny", "1"),)


def test_leftovers_of_a_killed_writer(tmp_path: Path) -> None:
    """Folders of a killed export and files of a killed change of alias are removed with the next export."""
    (tmp_path / "tiny/.tmp-folder/tiny/1").mkdir(parents=True)
    (tmp_path / "tiny/.tmp-folder/tiny/1/encode.onnx").write_bytes(b"half")
    (tmp_path / "tiny/.tmp-file").write_bytes(b'{"default"')
    for leftover in (tmp_path / "tiny").iterdir():
        os.utime(leftover, (0, 0))  # long ago
    assert Store(tmp_path).ids() == ()
    builders.write_artifact(tmp_path)

    assert [entry.name for entry in (tmp_path / "tiny").iterdir()] == ["1"]


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is replaced whole; when that fails the old one stays and nothing is left over."""
    file = tmp_path / "aliases.json"
    artifact.write_atomically(file, b"old")

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "_write_flushed", full)
    with pytest.raises(OSError, match="No space"):
        artifact.write_atomically(file, b"new")

    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("aliases.json", b"old")]


class TestOnnxFile:
    """What an ONNX file may ask for."""

    @staticmethod
    def model(*nodes: onnx.NodeProto, initializers: tuple[onnx.TensorProto, ...] = (), **more: Any) -> bytes:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
        graph = helper.make_graph(
            list(nodes) or [helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value], list(initializers)
        )
        model = helper.make_model(graph)
        for name, values in more.items():
            getattr(model, name).extend(values)
        return model.SerializeToString()

    def refusal(self, content: bytes) -> str:
        with pytest.raises(InvalidArtifact) as refused:
            onnx_file.check(Path("g.onnx"), content)
        return refused.value.problem

    def test_plain_graphs(self) -> None:
        """What an export needs is allowed."""
        onnx_file.check(Path("g.onnx"), self.model())
        for content in builders.graphs().values():
            onnx_file.check(Path("g.onnx"), content)

    def test_external_data(self) -> None:
        """A tensor in another file is refused, as initializer and as attribute."""
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/passwd")
        node = helper.make_node("Constant", [], ["c"], value=tensor)

        assert "outside the file" in self.refusal(self.model(initializers=(tensor,)))
        assert "outside the file" in self.refusal(self.model(node))

    def test_bodies(self) -> None:
        """Loops and branches are refused, by operator and by their sub-graphs."""
        body = helper.make_graph([], "body", [], [])
        assert "'Loop'" in self.refusal(self.model(helper.make_node("Loop", ["x"], ["y"], body=body)))
        assert "sub-graph" in self.refusal(self.model(helper.make_node("Identity", ["x"], ["y"], body=body)))

    def test_strangers(self) -> None:
        """Operators of other domains, functions and sparse initializers are refused."""
        function = helper.make_function("f", "F", ["x"], ["y"], [], [])
        assert "custom domain 'evil'" in self.refusal(
            self.model(helper.make_node("Identity", ["x"], ["y"], domain="evil"))
        )
        assert "'PyOp'" in self.refusal(self.model(helper.make_node("PyOp", ["x"], ["y"])))
        assert "functions" in self.refusal(self.model(functions=[function]))
        sparse = helper.make_graph([], "g", [], [], sparse_initializer=[onnx.SparseTensorProto(dims=[1])])
        assert "sparse" in self.refusal(helper.make_model(sparse).SerializeToString())

    @settings(max_examples=200, deadline=None)
    @given(content=st.binary(max_size=200))
    def test_any_bytes(self, content: bytes) -> None:
        """Whatever the bytes, they are taken or refused: no other error comes of them."""
        with contextlib.suppress(InvalidArtifact):
            onnx_file.check(Path("g.onnx"), content)
