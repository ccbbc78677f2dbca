"""JSON as both ends understand it: one value, and none that two readers would read differently."""

import json
import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.contract import strict_json


@pytest.mark.parametrize(
    "content",
    [
        b"{'a': 1}",
        b"[1,]",
        b'{"a": 1,}',
        b"[01]",
        b"[+1]",
        b"[.5]",
        b"[1.]",
        b"[0x10]",
        b"[1_000]",
        b"// note\n[]",
        b'["\n"]',
        b'["\\x41"]',
        b"[True]",
        b"[1] [2]",
        b"\x00",
        b" ",
        b"\xed\xa0\x80",
        b'["\xc0\xaf"]',
        b"\xff\xfe[\x00]\x00",
    ],
)
def test_what_is_no_json(content: bytes) -> None:
    """Habits of other languages, UTF-16, overlong UTF-8 and surrogates as bytes are refused."""
    with pytest.raises(ValueError, match=r"line 1|utf-8|control character"):
        strict_json.loads(content)


@pytest.mark.parametrize(
    "content", [b'{"a": {"b": 1, "b": 1}}', b'[{"b": 1, "c": 2, "b": 3}]', b'{"b": 0, "\\u0062": 1}']
)
def test_a_key_twice_at_any_depth(content: bytes) -> None:
    """A key twice is refused in inner objects, with equal values, and when one is written as an escape."""
    with pytest.raises(ValueError, match="the key 'b' occurs twice"):
        strict_json.loads(content)


def test_a_long_key_twice() -> None:
    """The message stays short whatever the key is."""
    with pytest.raises(ValueError, match="occurs twice") as refused:
        strict_json.loads(json.dumps({"k" * 100_000: 1}).encode()[:-1] + b', "' + b"k" * 100_000 + b'": 2}')
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_depth(opening: bytes, depth: int) -> None:
    """Nesting beyond the stack is refused, and the interpreter lives on."""
    with pytest.raises(ValueError, match="nested too deeply"):
        strict_json.loads(opening * depth)


def test_long_numbers_cost_no_time() -> None:
    """Ten million digits, which Python would convert in quadratic time, are refused at once."""
    began = time.monotonic()
    with pytest.raises(ValueError, match="10,000,000 digits"):
        strict_json.loads(b"[" + b"9" * 10_000_000 + b"]")
    assert time.monotonic() - began < 2


def test_numbers_keep_their_kind() -> None:
    """Integers stay integers, what overflows is infinite for the caller to refuse, what underflows is zero."""
    found = strict_json.loads(b"[1, 1.0, 1e400, -1e400, 1e-400, -0, 16777217]")
    assert [type(number) for number in found] == [int, float, float, float, float, int, int]
    assert found == [1, 1, math.inf, -math.inf, 0, 0, 2**24 + 1]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789eE+-.\\uatrfnls \n', max_size=40).map(str.encode))
@example(b"[1E5]")
def test_any_bytes(content: bytes) -> None:
    """Any bytes are parsed as the json module parses them, or refused with ValueError; nothing else is raised."""
    try:
        found = strict_json.loads(content)
    except ValueError:
        return
    assert json.dumps(found) == json.dumps(json.loads(content))
