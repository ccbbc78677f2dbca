"""The store: names, versions, aliases; and names that try to leave it."""

import json
from pathlib import Path

import pytest

from service.contract.store import ModelId, Store
from service.errors import InvalidArtifact, ModelNotFound


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two models; versions 1, 2 and 10 of the first."""
    for path in ("blood/1", "blood/2", "blood/10", "lung/a", ".hidden/1", "Upper/1", "blood/.tmp-x", "empty"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "blood/aliases.json").write_text('{"default": "2", "canary": "10"}')
    return Store(tmp_path)


def test_listing(store: Store) -> None:
    """Names and versions that are well-formed, versions in the order of their numbers."""
    assert store.names() == ("blood", "lung")
    assert store.versions("blood") == ("1", "2", "10")
    assert store.ids() == (ModelId("blood", "1"), ModelId("blood", "2"), ModelId("blood", "10"), ModelId("lung", "a"))


@pytest.mark.parametrize(
    ("model", "version"),
    [("blood", "2"), ("blood@default", "2"), ("blood@canary", "10"), ("blood@1", "1"), ("lung", "a"), ("lung@a", "a")],
)
def test_resolve(store: Store, model: str, version: str) -> None:
    """A bare name means its default; without one the highest version; a name after @ is a version or an alias."""
    assert store.resolve(model) == ModelId(model.partition("@")[0], version)


def test_resolve_nothing(store: Store, tmp_path: Path) -> None:
    """Without a name the only model is meant; with several there is none, and they are listed."""
    with pytest.raises(ModelNotFound, match="lung@a"):
        store.resolve()
    (tmp_path / "one/x/1").mkdir(parents=True)
    assert str(Store(tmp_path / "one").resolve()) == "x@1"


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../blood",
        "blood/..",
        "/",
        "",
        "blood@..",
        "blood@../..",
        "blood@",
        "bl\0ood",
        "%2e%2e",
        "ЬLOOD",
        "b" * 10_000,
        "blood@9",
        "Upper",
        ".hidden",
    ],
)
def test_names_that_lead_nowhere(store: Store, name: str) -> None:
    """Whatever is not the name of a version is not found; the message stays short."""
    if name == "blood@":
        assert store.resolve(name).version == "2"
        return
    with pytest.raises(ModelNotFound) as refused:
        store.resolve(name)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"default": "9"}',
        '{"default": "1", "default": "2"}',
        '{"1": "2"}',
        '{"A b": "1"}',
        "nonsense",
        '{"default": 1}',
    ],
)
def test_aliases_that_are_wrong(store: Store, content: str) -> None:
    """Aliases of nothing, twice, or that hide a version are refused."""
    (store.root / "blood/aliases.json").write_text(content)
    with pytest.raises(InvalidArtifact, match=r"aliases\.json"):
        store.resolve("blood")


def test_set_alias(store: Store) -> None:
    """An alias is set among the others, in one step; nothing temporary is left."""
    store.set_alias(ModelId("blood", "1"))
    assert json.loads((store.root / "blood/aliases.json").read_text()) == {"default": "1", "canary": "10"}
    assert store.resolve("blood").version == "1"
    assert sorted(entry.name for entry in (store.root / "blood").iterdir()) == [
        ".tmp-x",
        "1",
        "10",
        "2",
        "aliases.json",
    ]
    with pytest.raises(ModelNotFound):
        store.set_alias(ModelId("blood", "9"))
    with pytest.raises(ValueError, match="cannot be an alias"):
        store.set_alias(ModelId("blood", "1"), "2")


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    """A directory that does not exist holds nothing."""
    assert Store(tmp_path / "nowhere").ids() == ()


def test_links_are_not_versions(store: Store) -> None:
    """A link to a directory is not followed."""
    (store.root / "lung/b").symlink_to(store.root / "blood/1")
    assert store.versions("lung") == ("a",)
