"""Content-Type and Accept: which format comes in, which goes out, and what is refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.negotiation import answer_format, body_format
from service.cells.formats import BODIES, FORMATS
from service.errors import NotAcceptable, UnsupportedMediaType

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"


@pytest.mark.parametrize("media_type", BODIES)
@pytest.mark.parametrize("spelling", ["{}", "{}; charset=utf-8", " {} ;a=b;c", "{}".upper()])
def test_content_type(media_type: str, spelling: str) -> None:
    """Parameters, space and case do not matter."""
    sent = spelling.format(media_type)
    assert body_format(sent.upper() if spelling.isupper() else sent) is FORMATS[media_type]


@pytest.mark.parametrize(
    "sent", [None, "", ";", "text/csv", "application/jsonx", "application/*", "*/*", "multipart/form-data", "é"]
)
def test_content_types_that_are_not_read(sent: str | None) -> None:
    """A missing or other type is refused with what was found and all that is accepted."""
    with pytest.raises(UnsupportedMediaType) as refused:
        body_format(sent)

    assert refused.value.found == (sent or "")
    for media_type in BODIES:
        assert media_type in refused.value.detail


def test_a_long_content_type_is_cut() -> None:
    """What a client sends comes back in a message at most 100 characters long."""
    with pytest.raises(UnsupportedMediaType) as refused:
        body_format("x" * 10_000)

    assert len(refused.value.found) == 100


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        (None, JSON),
        ("", JSON),
        ("  ", JSON),
        ("*/*", JSON),
        (ARROW, ARROW),
        (ARROW.upper(), ARROW),
        (f"{JSON}, {ARROW}", JSON),
        (f"{JSON};q=0.4, {ARROW};q=0.5", ARROW),
        (f"{JSON};Q=0.4,{ARROW};q=0.5", ARROW),
        (f"*/*;q=0.1, {ARROW};q=0.2", ARROW),
        (f"application/*;q=0.3, {JSON};q=0.1", ARROW),
        # The most specific range counts, not the greatest weight (RFC 9110, 12.5.1).
        (f"{JSON};q=0, */*", ARROW),
        (f"*/*, {JSON};q=0, {ARROW};q=0.1", "application/x-hdf5"),
        (f"{JSON};q=0.9;version=1, {ARROW};q=nonsense", JSON),
        (f"{JSON};q=nan, {ARROW};q=0.1", ARROW),
        (f"{JSON};q=-1, {ARROW};q=0.1", ARROW),
        (f"{JSON};q=5, {ARROW}", JSON),
        (",,, ;q=1, */*", JSON),
    ],
)
def test_accept(accept: str | None, given: str) -> None:
    """The best of what Accept allows; where it leaves the choice, the format of the body, which is JSON here."""
    assert answer_format(accept, FORMATS[JSON]).media_type == given


@pytest.mark.parametrize("accept", ["text/html", f"{JSON};q=0, {ARROW};q=0", "application/json;q=0", "nonsense", ";;"])
def test_accept_that_cannot_be_met(accept: str) -> None:
    """Where nothing that is asked for can be given, that is refused with all that could be."""
    with pytest.raises(NotAcceptable) as refused:
        answer_format(accept, FORMATS[JSON])

    for media_type in FORMATS:
        assert media_type in refused.value.offered


@given(st.text(max_size=60))
def test_any_text_is_a_choice_or_a_refusal(text: str) -> None:
    """Whatever stands in the two headers, there is a format or the error that says so, and no other."""
    for body in BODIES.values():
        with contextlib.suppress(NotAcceptable):
            assert answer_format(text, body) in FORMATS.values()
    with contextlib.suppress(UnsupportedMediaType):
        assert body_format(text) in BODIES.values()


@given(st.sampled_from(list(BODIES)), st.sampled_from(list(FORMATS)))
def test_what_is_asked_for_alone_is_given(body: str, asked: str) -> None:
    """Any format can be had for any body."""
    assert answer_format(asked, FORMATS[body]) is FORMATS[asked]
    assert answer_format("*/*", FORMATS[body]) is FORMATS[body]
