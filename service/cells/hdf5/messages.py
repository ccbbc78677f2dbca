"""Messages between the server and the process that has to do with HDF5: a JSON head and numpy arrays, over a socket or in a file.

Layout: the length of the head (4 bytes, little-endian), the head, the bytes of the arrays that it lists under "arrays".
"""

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HEAD_BYTES = 64 * 2**20
"""Names of genes and cells make the longest."""

MAX_ARRAY_BYTES = 64 * 2**20
"""Of one message."""

_KINDS = "uif"

Message = tuple[dict[str, Any], list[NDArray[Any]]]


class BrokenMessage(Exception):
    """What arrived is no message, or one beyond the limits: whoever sent it is not what it should be."""


def pack(head: dict[str, Any], arrays: Sequence[NDArray[Any]] = ()) -> bytes:
    """A message; arrays are one-dimensional numbers."""
    listed = {**head, "arrays": [(array.dtype.str, len(array)) for array in arrays]}
    encoded = json.dumps(listed).encode()
    pieces = [struct.pack("<I", len(encoded)), encoded, *(np.ascontiguousarray(array).tobytes() for array in arrays)]
    return b"".join(pieces)


def unpack(read: Callable[[int], bytes]) -> Message | None:
    """The next message of a source.

    Args:
        read: gives exactly so many bytes, or fewer where the source ends.

    Returns:
        None where the source ended before it.

    Raises:
        BrokenMessage: it ended within the message, or the message is beyond the limits.
    """
    prefix = read(4)
    if not prefix:
        return None
    if len(prefix) < 4:
        raise BrokenMessage("it is cut off")
    (length,) = struct.unpack("<I", prefix)
    if length > MAX_HEAD_BYTES:
        raise BrokenMessage("its head is too long")
    try:
        head = json.loads(_exactly(read, length))
        listed = [(np.dtype(kind), int(size)) for kind, size in head.pop("arrays")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenMessage(f"its head cannot be read: {error}") from None
    if any(dtype.kind not in _KINDS or size < 0 for dtype, size in listed):
        raise BrokenMessage("an array is of another kind")
    if sum(dtype.itemsize * size for dtype, size in listed) > MAX_ARRAY_BYTES:
        raise BrokenMessage("its arrays are too long")
    return head, [np.frombuffer(_exactly(read, dtype.itemsize * size), dtype) for dtype, size in listed]


def _exactly(read: Callable[[int], bytes], n_bytes: int) -> bytes:
    content = read(n_bytes)
    if len(content) < n_bytes:
        raise BrokenMessage("it is cut off")
    return content
