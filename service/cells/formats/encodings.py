"""Content-Encoding: bodies that are compressed as a whole, undone within a bound."""

import zlib

from service.errors import BodyTooLarge, MalformedBody

ENCODINGS: dict[str, int] = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""Window and wrapper as zlib wants them; deflate is zlib's wrapper (RFC 9110, 8.4.1.2)."""


def decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without its encoding, which is one of `ENCODINGS` or identity.

    Raises:
        BodyTooLarge: it is more than `max_bytes`; no more than that has been decoded.
        MalformedBody: the body is damaged, cut off, or goes on after its end.
    """
    if encoding == "identity":
        return body
    decoder = zlib.decompressobj(ENCODINGS[encoding])
    try:
        content = decoder.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise MalformedBody(problem=f"The body is not {encoding}: {error}.") from None
    if len(content) > max_bytes:
        raise BodyTooLarge(limit_bytes=max_bytes)
    if not decoder.eof or decoder.unused_data:
        raise MalformedBody(problem=f"The {encoding} body is cut off, or something follows it.")
    return content
