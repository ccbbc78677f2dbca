"""JSON read as its specification intends: one value, finite numbers, no key twice."""

import json
import re
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MAX_DIGITS = 400  # beyond this Python would spend quadratic time on an integer, and no count is that long


def loads(content: bytes | bytearray | memoryview) -> Any:
    """Parse one JSON document.

    Raises:
        ValueError: not UTF-8, not JSON (with line and column), a key twice, NaN or Infinity, an absurdly long number, or nested too deeply.
    """
    text = str(content, "utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair, which is no text") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} occurs twice in one object")
    return result


def _constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)
