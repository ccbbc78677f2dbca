"""The store: names, versions, aliases; and names that try to leave it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.store import ModelId, Store, _natural
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


def test_aliases_stay_in_the_store(store: Store) -> None:
    """The name of a model is never joined to a path unchecked."""
    (store.root / "aliases.json").write_text('{"default": "1"}')
    for name in ("", ".", "blood/..", "../" + store.root.name):
        assert store.aliases(name) == {}


def test_a_link_is_no_list_of_aliases(store: Store, tmp_path: Path) -> None:
    """Aliases in a file elsewhere are refused: nothing outside the store is read."""
    (tmp_path / "elsewhere.json").write_text('{"default": "1"}')
    (store.root / "blood/aliases.json").unlink()
    (store.root / "blood/aliases.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InvalidArtifact, match=r"aliases\.json"):
        store.resolve("blood")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"default": ["1"]}',
        b'{"default": null}',
        b'{"default": "../1"}',
        b'{"..": "1"}',
        b'{"canary": "default", "default": "canary"}',
        b'{"self": "self"}',
        b"\xff",
        b"",
        b" " * 2**22 + b"{}",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_aliases_that_are_worse(store: Store, content: bytes) -> None:
    """Cycles, other types, bytes that are no text and files without measure are refused and named, nothing else is raised."""
    (store.root / "blood/aliases.json").write_bytes(content)
    with pytest.raises(InvalidArtifact, match=r"aliases\.json"):
        store.resolve("blood")


def test_a_refused_alias_changes_nothing(store: Store) -> None:
    """An alias that cannot be set leaves the old ones."""
    before = (store.root / "blood/aliases.json").read_bytes()
    for model, alias in (
        (ModelId("blood", "9"), "default"),
        (ModelId("../blood", "1"), "default"),
        (ModelId("blood", "1"), "../x"),
        (ModelId("blood", "1"), "Default"),
        (ModelId("blood", "1"), "10"),
        (ModelId("blood", "1"), "a\n"),
    ):
        with pytest.raises((ModelNotFound, ValueError)):
            store.set_alias(model, alias)
    assert (store.root / "blood/aliases.json").read_bytes() == before


def test_a_listing_is_of_one_moment(store: Store) -> None:
    """What was listed resolves as it did, whatever happens to the directory afterwards."""
    listing = store.listing()
    store.set_alias(ModelId("blood", "1"))
    (store.root / "lung/a").rmdir()

    assert (str(listing.resolve("blood")), str(listing.resolve("lung"))) == ("blood@2", "lung@a")
    assert store.resolve("blood").version == "1"


@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True))
def test_versions_that_are_numbers(numbers: list[int]) -> None:
    """Numbers are ordered by value, also behind a letter or a point."""
    for form in ("{}", "v{}", "1.{}", "2026-{}-rc"):
        versions = [form.format(number) for number in numbers]
        assert sorted(versions, key=_natural) == [form.format(number) for number in sorted(numbers)]


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,9}", fullmatch=True)))
def test_versions_of_any_form(versions: list[str]) -> None:
    """All versions that may exist can be ordered."""
    assert sorted(sorted(versions, key=_natural)) == sorted(versions)
