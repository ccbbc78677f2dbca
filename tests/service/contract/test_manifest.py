"""manifest.json: every place of it is checked, and nothing is converted in silence."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract import artifact
from service.contract.manifest import File, Graph, Manifest
from service.errors import InvalidArtifact
from tests import builders

DOCUMENT, _ = builders.parts(is_explained=False)
# Dictionaries by names that the format does not know.
OPEN = ("provenance.config", "provenance.packages", "provenance.hardware", "golden.tolerance")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, the document itself first."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def get(document: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        document = document[key]
    return document


def read(folder: Path, document: Any) -> Manifest:
    """The document as the manifest of a version directory."""
    path = folder / "tiny/1"
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return artifact.read_manifest(path)


def with_value(at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    document = deepcopy(DOCUMENT)
    get(document, at[:-1])[at[-1]] = value
    return document


def dotted(at: tuple[Any, ...]) -> str:
    return ".".join(map(str, at))


PLACES = [at for at in places(DOCUMENT) if at]


def test_round_trip(tmp_path: Path) -> None:
    """What is written is read back equal."""
    manifest = Manifest.model_validate(DOCUMENT)
    assert read(tmp_path, manifest.model_dump_json()) == manifest
    assert manifest.id == "tiny@1"


def is_right_too(at: tuple[Any, ...], value: Any) -> bool:
    """Whether a value is of a type that the place may have beside that of the tiny model."""
    right = get(DOCUMENT, at)
    if value is None and dotted(at) in ("reference", "reference.umap", "reference.vote"):
        return True
    if at[-2:-1] in {("ontology_ids",), ("shape",)}:
        return value is None or isinstance(value, str | int)  # a class without a term; an axis without a name
    if isinstance(value, dict):
        return isinstance(right, dict) and (not value or dotted(at) in OPEN)
    return type(value) is type(right) or (type(value) in (int, float) and at[0] in ("golden", "parity", "genes"))


@pytest.mark.parametrize("at", PLACES, ids=dotted)
def test_every_place_has_one_type(tmp_path: Path, at: tuple[Any, ...]) -> None:
    """At no place is a value of another type taken for the right one: no "1" for 1, no true for 1, no null for a default."""
    for wrong in (None, "text", "1", 1.5, True, [], {}, [1], {"surprise": 1}, -1):
        if is_right_too(at, wrong):
            continue  # the values of texts and numbers have tests of their own
        with pytest.raises(InvalidArtifact) as refused:
            read(tmp_path, with_value(at, wrong))
        assert "manifest.json" in refused.value.path
        assert len(str(refused.value)) < 500 + len(str(tmp_path))


OBJECTS = [(), *(at for at in PLACES if isinstance(get(DOCUMENT, at), dict) and dotted(at) not in OPEN)]


@pytest.mark.parametrize("at", OBJECTS, ids=dotted)
def test_unknown_fields_anywhere(tmp_path: Path, at: tuple[Any, ...]) -> None:
    """A manifest never says something that nobody reads, however deep."""
    with pytest.raises(InvalidArtifact):
        read(tmp_path, with_value((*at, "surprise"), 1))


REQUIRED = [(key,) for key in DOCUMENT if key not in ("labels", "reference")] + [
    ("genes", key) for key in DOCUMENT["genes"]
]


@pytest.mark.parametrize("at", REQUIRED, ids=dotted)
def test_what_is_missing_is_named(tmp_path: Path, at: tuple[str, ...]) -> None:
    """Each field that has no default is missed by its name."""
    document = deepcopy(DOCUMENT)
    del get(document, at[:-1])[at[-1]]
    with pytest.raises(InvalidArtifact, match=dotted(at)):
        read(tmp_path, document)


@pytest.mark.parametrize("version", [0, 2, 999, -1, "1", 1.0, True, None, [1]])
def test_other_schema_versions(tmp_path: Path, version: Any) -> None:
    """Another schema_version is refused before the rest is looked at, and both numbers are said."""
    with pytest.raises(InvalidArtifact, match=r"schema_version is .*, this program reads 1$"):
        read(tmp_path, {"schema_version": version, "what": "the future holds"})


@pytest.mark.parametrize("document", ["[]", "1", "null", '"text"', ""])
def test_what_is_no_object(tmp_path: Path, document: str) -> None:
    """A document that is no object is refused as every other."""
    with pytest.raises(InvalidArtifact, match=r"schema_version is None|not valid JSON"):
        read(tmp_path, document)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize("at", [("genes", "min_gene_overlap"), ("golden", "tolerance", "encode/latent")], ids=dotted)
def test_infinite_numbers(tmp_path: Path, at: tuple[str, ...], number: str) -> None:
    """No threshold is NaN or infinite, in whichever way JSON may write it."""
    text = json.dumps(with_value(at, "HERE")).replace('"HERE"', number)
    with pytest.raises(InvalidArtifact):
        read(tmp_path, text)


@pytest.mark.parametrize("overlap", [0, -0.5, 1.01])
def test_the_overlap_is_a_share(tmp_path: Path, overlap: float) -> None:
    """The floor of the gene overlap lies above 0 and is at most 1."""
    with pytest.raises(InvalidArtifact, match=r"genes\.min_gene_overlap"):
        read(tmp_path, with_value(("genes", "min_gene_overlap"), overlap))


@pytest.mark.parametrize(
    "tolerance",
    [
        {},
        {"encode/latent": 1e-4},
        {**DOCUMENT["golden"]["tolerance"], "encode/nothing": 1e-4},
        {**DOCUMENT["golden"]["tolerance"], "encode/latent": -1e-4},
    ],
)
def test_every_output_has_a_tolerance(tmp_path: Path, tolerance: dict[str, float]) -> None:
    """Golden cells prove each output of each graph: none without a tolerance, none that is not there, none below zero."""
    with pytest.raises(InvalidArtifact, match="tolerance"):
        read(tmp_path, with_value(("golden", "tolerance"), tolerance))


WRONG_NAMES = [
    "",
    ".",
    "..",
    "../genes.tsv",
    "reference/../genes.tsv",
    "/etc/passwd",
    "other/genes.tsv",
    "reference/",
    "reference//a",
    "reference/reference/a",
    ".hidden",
    "-rf",
    "a b",
    "a\\b",
    "a\0",
    "a\n",
    "genes.tsv\n",
    "ɡenes.tsv",
    "a" * 101,
]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_file_names_are_no_paths(tmp_path: Path, name: str) -> None:
    """A file is named by one plain component, or one within reference/; as a key of `files` and where it is used."""
    with pytest.raises(InvalidArtifact):
        read(tmp_path, with_value(("genes", "file"), name))
    with pytest.raises(InvalidArtifact):
        read(tmp_path, with_value(("files", name), DOCUMENT["files"]["genes.tsv"]))


@given(name=st.text(max_size=20) | st.text(alphabet="ab./-_%\\~: \0\n", max_size=12))
def test_no_file_name_leads_out(name: str) -> None:
    """Whatever name is accepted stays below the directory that it is joined to."""
    try:
        accepted = Graph(file=name, inputs=(), outputs=()).file
    except ValidationError:
        return
    assert Path("/store/m/1", accepted).resolve().is_relative_to("/store/m/1")
    assert accepted.count("/") == accepted.startswith("reference/")


@pytest.mark.parametrize("name", ["", "..", "a/b", "Tiny", "tiny ", "tiny\n", "-tiny", "tïny", "t" * 65])
def test_model_names(name: str) -> None:
    """A model's name is a folder, a word of a URL and of a metric label."""
    with pytest.raises(ValidationError):
        Manifest.model_validate({**DOCUMENT, "name": name})


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n"])
def test_digests(digest: str) -> None:
    """A sha256 is 64 lower-case hexadecimal digits."""
    with pytest.raises(ValidationError):
        File(sha256=digest, n_bytes=1)


def test_labels() -> None:
    """The classes of a level are told apart, and the classifier gives as many probabilities."""
    level = DOCUMENT["labels"][0]
    for changes in (
        {"classes": ["B", "B", "NK"]},
        {"ontology_ids": [None]},
        {"classes": ["B", "T"], "ontology_ids": [None, None]},
        {"name": "Cell Type"},
    ):
        with pytest.raises(ValidationError):
            Manifest.model_validate({**DOCUMENT, "labels": [{**level, **changes}]})
    Manifest.model_validate({**DOCUMENT, "labels": [], "reference": None})
    with pytest.raises(ValidationError, match="'cell_type', which is no label level"):
        Manifest.model_validate({**DOCUMENT, "labels": []})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"n_cells": 24}, "24 cells cannot be drawn from 23"),
        ({"n_cells": 0}, "n_cells"),
        ({"latent": "reference/other.npy"}, "files does not list reference/other.npy"),
        ({"latent": "../latent.npy"}, "latent"),
        ({"metric": "cosine"}, "metric"),
        ({"index": "hnsw"}, "index"),
        ({"vote": {"n_neighbours": 24, "weighting": "uniform", "answers": {}}}, "24 neighbours vote"),
        ({"vote": {"n_neighbours": 101, "weighting": "uniform", "answers": {}}}, "n_neighbours"),
        ({"vote": {"n_neighbours": 5, "weighting": "best", "answers": {}}}, "weighting"),
        ({"vote": {"n_neighbours": 5, "weighting": "uniform", "answers": {"cell_type": "both"}}}, "cell_type"),
    ],
)
def test_reference(changes: dict[str, Any], found: str) -> None:
    """What is said of the reference cells is possible."""
    with pytest.raises(ValidationError, match=found):
        Manifest.model_validate({**DOCUMENT, "reference": {**DOCUMENT["reference"], **changes}})


@pytest.mark.parametrize(
    ("graph", "part", "at", "changes", "found"),
    [
        ("project", "outputs", 0, {"name": "tsne"}, "project does not"),
        ("project", "outputs", 0, {"shape": ["n", 3]}, "project does not"),
        ("project", "inputs", 0, {"name": "counts"}, "project does not"),
        ("decode", "outputs", 1, {"shape": ["n", 3]}, "expression_variance"),
    ],
)
def test_signatures(graph: str, part: str, at: int, changes: dict[str, Any], found: str) -> None:
    """Graphs whose tensors have a meaning have those tensors."""
    document = deepcopy(DOCUMENT)
    document["graphs"][graph][part][at].update(changes)
    if "name" in changes and part == "outputs":
        for where in (document["golden"]["tolerance"], document["parity"]["outputs"]):
            where[f"{graph}/{changes['name']}"] = where.pop(f"{graph}/umap")
    with pytest.raises(ValidationError, match=found):
        Manifest.model_validate(document)


def test_a_manifest_is_immutable() -> None:
    """What was verified cannot be changed afterwards."""
    manifest = Manifest.model_validate(DOCUMENT)
    with pytest.raises(ValidationError):
        manifest.name = "other"
    with pytest.raises(ValidationError):
        manifest.genes.n_genes = 1


def test_a_profile_of_the_reference(tmp_path: Path) -> None:
    """What an artifact says of its reference is about classes that it has, in shares and quantiles that can be."""
    good = {**DOCUMENT, "profile": builders.PROFILE}
    assert read(tmp_path, good).profile.library_size.quantiles["0.5"] == 60
    assert read(tmp_path, DOCUMENT).profile is None

    for at, value in (
        (("labels", "cell_type", "shares"), {"Fibroblast": 1.0}),
        (("labels", "cell_type", "shares"), {"B": 1.5}),
        (("labels",), {"tissue": builders.PROFILE["labels"]["cell_type"]}),
        (("library_size", "quantiles"), {"0.5": 3.0}),
        (("library_size", "quantiles", "0.25"), 1_000.0),
        (("n_cells",), 0),
    ):
        wrong = deepcopy(good)
        get(wrong["profile"], at[:-1])[at[-1]] = value
        with pytest.raises(InvalidArtifact, match="profile"):
            read(tmp_path, wrong)
