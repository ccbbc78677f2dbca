"""traffic.json: what it may say, how it is read, and that a request's place is a matter of its id alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.store import Store
from service.contract.traffic import Split, Traffic, parse, position
from service.errors import InvalidArtifact, ModelNotFound
from tests.builders import write_artifact


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two versions of one model, the second of which is the canary."""
    for version in ("1", "2"):
        write_artifact(tmp_path, version=version)
    store = Store(tmp_path)
    store.set_alias(store.resolve("tiny@1"))
    store.set_alias(store.resolve("tiny@2"), "canary")
    return store


def test_round_trip(store: Store) -> None:
    """What was set is read; without a file there is no traffic."""
    assert store.traffic("tiny") == Traffic()
    wanted = Traffic(split=Split(to="canary", share=0.1), shadow="2")
    store.set_traffic("tiny", wanted)
    assert store.traffic("tiny") == wanted
    assert json.loads((store.root / "tiny/traffic.json").read_text()) == {
        "split": {"to": "canary", "share": 0.1},
        "shadow": "2",
    }
    with pytest.raises(ModelNotFound):
        store.set_traffic("tiny", Traffic(shadow="7"))
    assert store.traffic("tiny") == wanted


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"split": {"to": "2", "share": 1.5}}, "split.share"),
        ({"split": {"to": "2", "share": -0.1}}, "split.share"),
        ({"split": {"to": "2", "share": "half"}}, "split.share"),
        ({"split": {"to": "2"}}, "split.share"),
        ({"split": {"to": "", "share": 0.5}}, "split.to"),
        ({"shadow": 2}, "shadow"),
        ({"shaddow": "2"}, "shaddow"),
        ([], "the document"),
    ],
)
def test_what_it_must_not_say(document: Any, said: str) -> None:
    """Each fault is named by its place."""
    with pytest.raises(ValueError, match=said):
        parse(document)


@pytest.mark.parametrize(
    "content", ["nonsense", '{"shadow": "9"}', '{"split": {"to": "default2", "share": 0.5}}', "{} {}"]
)
def test_a_file_that_cannot_be_followed(store: Store, content: str) -> None:
    """What is not JSON, and what names neither version nor alias, is refused with the file's path."""
    (store.root / "tiny/traffic.json").write_text(content)
    with pytest.raises(InvalidArtifact, match=r"traffic\.json"):
        store.traffic("tiny")


@given(st.text(), st.text())
def test_position(name: str, request_id: str) -> None:
    """It lies between 0 and 1 and is the same every time."""
    assert 0 <= position(name, request_id) < 1
    assert position(name, request_id) == position(name, request_id)


def test_positions_are_uniform_and_independent() -> None:
    """Of 10,000 ids each tenth of the range gets its tenth, and two models draw from other places."""
    places = [position("a", str(number)) for number in range(10_000)]
    shares = [sum(low <= 10 * place < low + 1 for place in places) / 10_000 for low in range(10)]
    assert all(abs(share - 0.1) < 0.015 for share in shares)  # 5 standard deviations
    both = sum(place < 0.1 and position("b", str(number)) < 0.1 for number, place in enumerate(places))
    assert 50 <= both <= 150  # 100 expected; 5 standard deviations


def test_position_on_every_machine() -> None:
    """The place of an id is part of the contract: replicas of a server agree on it."""
    assert position("pbmc", "abc-123") == 0.30737366081790657
