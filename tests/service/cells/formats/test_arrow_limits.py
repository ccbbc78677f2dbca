"""What a stream would decompress to, known before it does."""

import contextlib
import io
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.formats.arrow import read
from service.cells.formats.arrow_limits import _table, check_decoded_size, is_compressed
from service.errors import BodyTooLarge, CellserveError, MalformedBody

N_ZEROS = 2**20


def zeros(n_values: int = N_ZEROS) -> pa.RecordBatch:
    """One cell of `n_values` zeros, which compress to next to nothing; 6 bytes a value and 16 bytes of offsets."""
    offsets = pa.array([0, n_values], pa.int32())
    columns = {
        "gene": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(n_values, np.int32))),
        "count": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(n_values, np.uint16))),
    }
    return pa.record_batch(columns).replace_schema_metadata({"genes": '["A"]'})


def stream(
    batches: list[pa.RecordBatch], compression: str | None = None, custom: dict | None = None, **options: object
) -> bytes:
    sink = io.BytesIO()
    settings_ = pa.ipc.IpcWriteOptions(compression=compression, **options)
    with pa.ipc.new_stream(sink, batches[0].schema, options=settings_) as writer:
        for batch in batches:
            writer.write_batch(batch, custom_metadata=custom)
    return sink.getvalue()


def declared(body: bytes) -> int:
    """The smallest limit under which a stream passes."""
    low, high = 0, 2**40
    while low < high:
        middle = (low + high) // 2
        try:
            check_decoded_size(body, middle)
            high = middle
        except BodyTooLarge:
            low = middle + 1
    return low


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5_000), min_size=1, max_size=4), compression=st.sampled_from([None, "lz4", "zstd"])
)
def test_what_is_declared_is_what_is_decoded(sizes: list[int], compression: str | None) -> None:
    """The size that is found is that of all buffers of all batches, as pyarrow counts them, but for padding."""
    batches = [zeros(size) for size in sizes]
    found = declared(stream(batches, compression))
    exact = sum(batch.nbytes for batch in batches)
    assert exact <= found <= exact + len(batches) * 6 * 64


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_bombs_of_many_batches(compression: str) -> None:
    """Batches that are each below the limit are refused when together they are above, before one is decompressed."""
    body = stream([zeros(2**16)] * 64, compression)
    before = pa.total_allocated_bytes()
    with pytest.raises(BodyTooLarge):
        read(body, 2**22)
    assert pa.total_allocated_bytes() - before < 2**20


def test_the_limit_itself() -> None:
    """As many bytes as are allowed are allowed."""
    body = stream([zeros()], "zstd")
    limit = declared(body)
    assert read(body, limit).counts.shape == (1, 1)
    with pytest.raises(BodyTooLarge) as refused:
        read(body, limit - 1)
    assert refused.value.limit_bytes == limit - 1


def test_dictionaries_count() -> None:
    """Words of a dictionary are decompressed as batches are, and count."""
    batch = zeros(2)
    words = pa.array(["w" * 2**20])
    column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), words)
    batch = pa.record_batch([*batch.columns, column], names=["gene", "count", "batch"]).replace_schema_metadata(
        batch.schema.metadata
    )
    assert 2**20 < declared(stream([batch], "zstd")) < 2**20 + 2000


def test_buffers_that_are_not_worth_compressing() -> None:
    """A buffer that the writer left as it is counts as long as it is."""
    random = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    offsets = pa.array([0, len(random)], pa.int32())
    batch = pa.record_batch(
        {
            "gene": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(len(random), np.int32))),
            "count": pa.ListArray.from_arrays(offsets, pa.array(random)),
        }
    ).replace_schema_metadata({"genes": '["A"]'})
    assert 5 * len(random) < declared(stream([batch], "zstd")) < 5 * len(random) + 500


def test_the_compression_of_arrow_0_17() -> None:
    """Messages of the old metadata version may name their compression in another place: they must not slip through."""
    body = bytearray(
        stream(
            [zeros()],
            "zstd",
            custom={"ARROW:experimental_compression": "zstd"},
            metadata_version=pa.ipc.MetadataVersion.V4,
        )
    )
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(bytes(body))):
        if message.type == "record batch":  # take out what the new place says
            metadata = memoryview(message.metadata.to_pybytes())
            batch = _table(metadata, struct.unpack_from("<I", metadata)[0], field=2)
            vtable = batch - struct.unpack_from("<i", metadata, batch)[0]
            struct.pack_into("<H", body, bytes(body).index(metadata) + vtable + 4 + 2 * 3, 0)
    assert len(body) < 10_000
    with pytest.raises((BodyTooLarge, MalformedBody)):
        read(bytes(body), 2**20)


@pytest.mark.parametrize("size", [-2, -(2**63), 2**31, 2**40, 2**63 - 1])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_sizes_that_lie(compression: str, size: int) -> None:
    """A buffer that declares another size than it has is refused, and what it declares is not allocated."""
    body = bytearray(stream([zeros()], compression))
    honest = struct.pack("<q", 4 * N_ZEROS)
    assert body.count(honest) == 1
    at = body.index(honest)
    body[at : at + 8] = struct.pack("<q", size)
    before = pa.total_allocated_bytes()
    with pytest.raises((BodyTooLarge, MalformedBody)):
        read(bytes(body), 2**30)
    assert pa.total_allocated_bytes() - before < 2**20


def test_a_size_that_is_too_small() -> None:
    """A buffer that declares less than it decompresses to is refused."""
    body = bytearray(stream([zeros()], "zstd"))
    at = body.index(struct.pack("<q", 4 * N_ZEROS))
    body[at : at + 8] = struct.pack("<q", 64)
    with pytest.raises(MalformedBody):
        read(bytes(body), 2**30)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_headers(data: st.DataObject) -> None:
    """Whatever four bytes of the headers are overwritten with, the stream is read or refused; nothing else is raised."""
    body = bytearray(stream([zeros(4)] * 2, "zstd"))
    at = data.draw(st.integers(0, len(body) - 4))
    body[at : at + 4] = data.draw(
        st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
    )
    with contextlib.suppress(CellserveError, pa.ArrowException, struct.error, OSError, EOFError):
        check_decoded_size(bytes(body), 2**20)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_is_compressed(compression: str | None) -> None:
    """Zeros that were compressed are told from zeros that were not, and a damaged stream is taken for compressed."""
    body = stream([zeros()], compression)
    assert is_compressed(body) == (compression is not None)
    assert is_compressed(body[:-20])
