"""Problem documents: one form for every error, with a stable code, and nothing of the inside of the process."""

import json
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from service import errors, metrics
from service.api import problems
from service.api.problems import problem
from service.errors import CellserveError

EXAMPLES: dict[Any, Any] = {int: 3, float: 0.25, str: "some {words} % with 'signs'\n", dict[str, str]: {"m@1": "ready"}}


def example(error: type[CellserveError]) -> CellserveError:
    """An error with all its fields filled in."""
    hints = get_type_hints(error)
    return error(**{field.name: EXAMPLES[hints[field.name]] for field in fields(error)})


@pytest.mark.parametrize("kind", problems.STATUS, ids=lambda kind: kind.code)
def test_every_error(kind: type[CellserveError]) -> None:
    """Each error becomes a document with its code, title, whole sentence and numbers, whatever its fields hold."""
    before = metrics.REFUSED.labels(kind.code)._value.get()
    answer = problem(example(kind))
    document = json.loads(bytes(answer.body))

    assert answer.status_code == document["status"] == problems.STATUS[kind]
    assert answer.headers["content-type"] == "application/problem+json"
    assert document["type"] == f"urn:cellserve:problem:{kind.code}"
    assert document["detail"] == example(kind).detail
    assert document["title"] == kind.title
    assert document["title"]
    for name, value in example(kind).members().items():
        assert document.get(name, document["detail"]) == value
    assert metrics.REFUSED.labels(kind.code)._value.get() == before + 1


def test_no_member_takes_the_place_of_a_standard_one() -> None:
    """A field of an error is never called as a member that RFC 9457 or we define."""
    for kind in problems.STATUS:
        assert not {field.name for field in fields(kind)} & {"type", "title", "status", "detail", "code", "request_id"}


def test_headers_that_tell_what_to_do() -> None:
    """429 says when to come back, 405 what is allowed, and where a body stays unread the connection is closed."""
    with_header = {
        header: {kind for kind in problems.STATUS if header in problem(example(kind)).headers}
        for header in ("retry-after", "allow", "connection")
    }

    assert with_header["retry-after"] == {kind for kind, status in problems.STATUS.items() if status == 429}
    assert with_header["allow"] == {errors.MethodNotAllowed}
    assert with_header["connection"] >= {errors.BodyTooLarge, errors.BodyTimeout, errors.TooManyBytes}
