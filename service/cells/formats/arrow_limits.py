"""What an Arrow stream would decompress to, read from its headers before anything is decompressed.

Arrow's metadata are flatbuffers; only the buffer list of a record batch is walked
(https://arrow.apache.org/docs/format/Columnar.html#recordbatch-message, Message.fbs).
"""

import struct

import pyarrow as pa

from service.errors import BodyTooLarge


def check_decoded_size(body: bytes, max_bytes: int) -> None:
    """Refuse a stream whose buffers declare more than `max_bytes` in all.

    Raises:
        BodyTooLarge: the declared sizes add up to more.
        pa.ArrowInvalid, struct.error: the stream or a header is damaged.
    """
    total = 0
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
        if message.type in ("record batch", "dictionary") and message.body is not None:
            total += _declared_bytes(memoryview(message.metadata), memoryview(message.body), message.type)
        if total > max_bytes:
            raise BodyTooLarge(limit_bytes=max_bytes)


def _declared_bytes(metadata: memoryview, body: memoryview, kind: str) -> int:
    message = struct.unpack_from("<I", metadata)[0]
    batch = _table(metadata, message, field=2)  # Message.header
    if batch and kind == "dictionary":
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
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    if 4 + 2 * field >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    entry = struct.unpack_from("<H", data, vtable + 4 + 2 * field)[0]
    return table + entry + int(struct.unpack_from("<I", data, table + entry)[0]) if entry else 0
