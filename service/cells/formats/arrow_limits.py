"""What an Arrow stream would decompress to, read from its headers before anything is decompressed.

Arrow's metadata are flatbuffers; only the lists of a record batch are walked
(https://arrow.apache.org/docs/format/Columnar.html#recordbatch-message, Message.fbs).
"""

import struct
from typing import NamedTuple

from service.errors import BodyTooLarge

_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # MessageHeader of Message.fbs
END = struct.pack("<Ii", 0xFFFFFFFF, 0)
"""The end-of-stream marker."""

MAX_METADATA_BYTES = 64 * 2**20
"""Of one message; the longest are the names of genes in a schema."""

_METADATA_V5 = 4  # MetadataVersion of Schema.fbs: Arrow 1.0 and later


def check_decoded_size(body: bytes, max_bytes: int) -> bool:
    """Refuse a stream whose buffers declare more than `max_bytes` in all.

    Returns:
        Whether the stream is whole: its end-of-stream marker stands where a message would begin. Readers take the end of the bytes for
        the end of the stream, and looking at the last bytes alone would take counts for a marker.

    Raises:
        BodyTooLarge: the declared sizes add up to more.
        struct.error: the stream or a header is damaged, or something follows the end.
    """
    view, total, position = memoryview(body), 0, 0
    while position < len(view):
        message = next_message(view, position)
        if isinstance(message, int):
            raise struct.error("a message is longer than the stream")
        if message.is_end:
            if message.end != len(view):
                raise struct.error("bytes follow the end of the stream")
            return True
        if message.kind in (_DICTIONARY_BATCH, _RECORD_BATCH):
            total += _declared_bytes(message.metadata, view[message.body : message.end], message.kind)
        if total > max_bytes:
            raise BodyTooLarge(limit_bytes=max_bytes)
        position = message.end
    return False


def is_compressed(body: bytes) -> bool:
    """Whether a stream would decompress to more than twice its bytes, or is damaged so that nobody knows."""
    try:
        check_decoded_size(body, 2 * len(body))
    except (BodyTooLarge, struct.error):
        return True
    return False


class Message(NamedTuple):
    """One message of a stream, by its place in the bytes."""

    kind: int
    """MessageHeader of Message.fbs."""

    metadata: memoryview
    body: int
    """Where its body begins."""

    end: int
    """Where the next message begins."""

    @property
    def is_end(self) -> bool:
        """Whether this is the end-of-stream marker."""
        return not len(self.metadata)

    @property
    def is_record_batch(self) -> bool:
        """Whether it holds cells."""
        return self.kind == _RECORD_BATCH


def next_message(view: memoryview, position: int) -> Message | int:
    """The message that begins at `position`; where its bytes are not all there, how many it has at least.

    Raises:
        struct.error: no message begins there, or its header is damaged.
    """
    if len(view) - position < 8:
        return 8
    continuation, size = map(int, struct.unpack_from("<Ii", view, position))
    start = position + 8
    if continuation != 0xFFFFFFFF or size < 0:
        raise struct.error("a message does not begin as one")
    if size > MAX_METADATA_BYTES:
        raise struct.error(f"a message's metadata are longer than {MAX_METADATA_BYTES:,} bytes")
    if start + size > len(view):
        return 8 + size
    metadata, body = view[start : start + size], start + size
    if size == 0:
        return Message(0, metadata, body, body)
    table = struct.unpack_from("<I", metadata)[0]
    if _scalar(metadata, table, field=0, kind="<h") != _METADATA_V5:  # Message.version
        raise struct.error(
            "metadata older than version 5, which may name a compression in places that are not looked at"
        )
    body_length = _scalar(metadata, table, field=3, kind="<q")  # Message.bodyLength
    if body_length < 0:
        raise struct.error("a message has a negative length")
    if body + body_length > len(view):
        return 8 + size + body_length
    return Message(_scalar(metadata, table, field=1, kind="<B"), metadata, body, body + body_length)


class Numbers(NamedTuple):
    """Where the numbers of a record batch stand in its header; all of them are of 64 bits."""

    body_length: int
    n_rows: int
    nodes: int
    """Length and number of nulls of each array, in the order of the schema, a list before what is in it."""

    buffers: int
    """Where each buffer begins in the message's body, and its bytes."""

    n_nodes: int
    n_buffers: int


def numbers_of(metadata: memoryview) -> Numbers | None:
    """The numbers of a record batch's header; None where it lacks some, or its buffers are compressed.

    Raises:
        struct.error: the header is damaged.
    """
    message = struct.unpack_from("<I", metadata)[0]
    batch = _table(metadata, message, field=2)  # Message.header
    if not batch or _table(metadata, batch, field=3):  # RecordBatch.compression
        return None
    body_length, n_rows = _entry(metadata, message, field=3), _entry(metadata, batch, field=0)
    nodes, buffers = _table(metadata, batch, field=1), _table(metadata, batch, field=2)
    if not (body_length and n_rows and nodes and buffers):
        return None
    n_nodes, n_buffers = (struct.unpack_from("<I", metadata, pairs)[0] for pairs in (nodes, buffers))
    return Numbers(message + body_length, batch + n_rows, nodes + 4, buffers + 4, n_nodes, n_buffers)


def is_little_endian(schema: memoryview) -> bool:
    """Whether the numbers of a stream with this schema message are little-endian."""
    table = _table(schema, struct.unpack_from("<I", schema)[0], field=2)  # Message.header
    return bool(table) and _scalar(schema, table, field=0, kind="<h") == 0  # Schema.endianness


def _declared_bytes(metadata: memoryview, body: memoryview, kind: int) -> int:
    message = struct.unpack_from("<I", metadata)[0]
    batch = _table(metadata, message, field=2)  # Message.header
    if batch and kind == _DICTIONARY_BATCH:
        batch = _table(metadata, batch, field=1)  # DictionaryBatch.data
    buffers = _table(metadata, batch, field=2) if batch else 0  # RecordBatch.buffers
    if not buffers or not _table(metadata, batch, field=3):  # RecordBatch.compression
        return len(body)
    total = 0
    for number in range(struct.unpack_from("<I", metadata, buffers)[0]):
        offset, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * number)
        if length > 0:
            (declared,) = struct.unpack_from("<q", body, offset)
            total += length if declared == -1 else declared  # -1: this buffer was left uncompressed
            if declared < -1:
                raise struct.error("a buffer declares a negative size")
    return total


def _table(data: memoryview, table: int, field: int) -> int:
    """Position that a table's offset field points to; 0 where the field is absent."""
    entry = _entry(data, table, field)
    return table + entry + int(struct.unpack_from("<I", data, table + entry)[0]) if entry else 0


def _scalar(data: memoryview, table: int, field: int, kind: str) -> int:
    """A table's number; 0 where the field is absent."""
    entry = _entry(data, table, field)
    return int(struct.unpack_from(kind, data, table + entry)[0]) if entry else 0


def _entry(data: memoryview, table: int, field: int) -> int:
    """Where a table keeps a field, from its own position; 0 where the field is absent."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    if 4 + 2 * field >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    return int(struct.unpack_from("<H", data, vtable + 4 + 2 * field)[0])
