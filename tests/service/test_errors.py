"""Errors: each with a code of its own, a status, and a sentence that its fields fill."""

import inspect
import re
import string
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from service import errors
from service.api.problems import CODES, STATUS
from service.errors import CellserveError


def family(parent: type[CellserveError] = CellserveError) -> list[type[CellserveError]]:
    """A class and all below it."""
    return [parent, *(below for child in parent.__subclasses__() for below in family(child))]


ERRORS = [error for error in family() if error.__module__ == errors.__name__]
EXAMPLES: dict[Any, Any] = {str: "{braces} 100% %s", int: 1234567, float: 0.125, dict[str, str]: {"m@1": "ready"}}


def made(error: type[CellserveError]) -> CellserveError:
    """An error with a value of the right type in every field."""
    kinds = get_type_hints(error)
    return error(**{field.name: EXAMPLES[kinds[field.name]] for field in fields(error)})


each = pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)


def test_the_family_is_whole() -> None:
    """Every class of errors.py descends from CellserveError, and none is declared anywhere else in service/."""
    declared = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert set(declared) == set(ERRORS)
    assert not [error for error in family() if error.__module__.startswith("service.") and error not in ERRORS]


def test_codes_are_unique() -> None:
    """Clients branch on the code: no two errors share one, and each is a plain word."""
    codes = [error.code for error in ERRORS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_codes_are_stable() -> None:
    """A code never changes and is never taken back: clients that know these go on to work."""
    assert set(CODES) >= set(
        """body_timeout body_too_large empty_body golden_mismatch internal_error invalid_artifact invalid_cells invalid_option
        malformed_body method_not_allowed model_not_found model_not_ready no_cells not_acceptable not_found not_raw_counts not_ready
        provider_unavailable queue_full shutting_down species_mismatch task_not_offered timeout too_few_genes too_many_bytes
        too_many_cells unstable_bits unsupported_media_type version_exists""".split()  # noqa: SIM905 - read as a list of words
    )


@each
def test_every_error_has_a_status(error: type[CellserveError]) -> None:
    """Each class stands in the table itself: problem() looks up the very class, not its parents."""
    assert 400 <= STATUS[error] < 600
    assert error.code in CODES


def test_every_status_has_an_error() -> None:
    """The table names no class that is gone."""
    assert set(STATUS) == set(ERRORS)


@each
def test_every_error_declares_its_own_words(error: type[CellserveError]) -> None:
    """Code, title and sentence are not those of the parent; the title is a heading and the docstring says when it is raised."""
    if error is not CellserveError:
        assert {"code", "title", "sentence"} <= vars(error).keys()
    assert error.title
    assert not error.title.endswith(".")
    assert error.__doc__


@each
def test_the_sentence_uses_the_fields_that_there_are(error: type[CellserveError]) -> None:
    """No placeholder lacks a field, and no field is left out of the sentence but lists of models."""
    placeholders = {name for _, name, _, _ in string.Formatter().parse(error.sentence) if name is not None}
    assert placeholders <= {field.name for field in fields(error)}
    assert {field.name for field in fields(error)} - placeholders <= {"models"}


@each
def test_the_sentence_is_filled(error: type[CellserveError]) -> None:
    """Every error says its sentence, whatever its fields hold, and gives its fields as plain values."""
    one = made(error)
    assert one.detail == str(one)
    assert one.detail
    assert one.members() == {field.name: getattr(one, field.name) for field in fields(error)}
    assert "{" not in one.detail.replace("{braces}", "")


@each
def test_errors_can_be_raised(error: type[CellserveError]) -> None:
    """An error is an exception like any other: hashable, compared by identity, caught by its base."""
    one = made(error)
    with pytest.raises(CellserveError) as caught:
        raise one
    assert caught.value is one
    assert one != made(error)
    assert len({one, made(error)}) == 2
