"""Which format comes in and which goes out: Content-Type and Accept."""

from collections.abc import Mapping

from service.cells.formats import BODIES, FORMATS
from service.cells.formats.format import Format
from service.errors import NotAcceptable, UnsupportedMediaType


def body_format(content_type: str | None, accepted: Mapping[str, Format] = BODIES) -> Format:
    """The format of a body.

    Args:
        content_type: as it was sent.
        accepted: formats by media type.

    Raises:
        UnsupportedMediaType: Content-Type is missing or none of those.
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type not in accepted:
        raise UnsupportedMediaType(
            header="Content-Type", found=(content_type or "")[:100], accepted=", ".join(accepted)
        )
    return accepted[media_type]


def answer_format(accept: str | None, body: Format) -> Format:
    """The format of the answer: the best that Accept allows; where it leaves the choice, the format of the body.

    Raises:
        NotAcceptable: nothing of what Accept names can be given.
    """
    preferred = [body, *(offered for offered in FORMATS.values() if offered is not body)]
    if accept is None or not accept.strip():
        return body
    weights = {offered.media_type: _weight(accept, offered.media_type) for offered in preferred}
    best = max(preferred, key=lambda offered: weights[offered.media_type])
    if weights[best.media_type] <= 0:
        raise NotAcceptable(found=accept[:100], offered=", ".join(FORMATS))
    return best


def _weight(accept: str, media_type: str) -> float:
    """The q of the most specific range that covers a type (RFC 9110, 12.5.1); 0 where none does."""
    weight, specificity = 0.0, -1
    for item in accept.split(","):
        wanted, *parameters = (part.strip().lower() for part in item.split(";"))
        covers = (media_type, media_type.partition("/")[0] + "/*", "*/*")
        if wanted in covers and 2 - covers.index(wanted) > specificity:
            specificity = 2 - covers.index(wanted)
            weight = _quality(parameters)
    return weight


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return min(1.0, max(0.0, float(parameter[2:])))
            except ValueError:
                return 0.0
    return 1.0
