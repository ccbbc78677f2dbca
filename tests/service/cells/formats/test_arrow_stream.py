"""Pieces: an Arrow stream cut at its record batches, however its bytes arrive."""

import contextlib
import struct

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from service.cells.formats.arrow import read
from service.cells.formats.arrow_stream import Pieces
from service.errors import BodyTooLarge, MalformedBody
from tests.builders import arrow_body, counts, gene_table

GENES = gene_table().gene_symbol
BODY = arrow_body(counts(10), GENES, rows_per_batch=3)


def fed(body: bytes, sizes: list[int], limit: int = 2**20) -> list[bytes]:
    """The pieces of a body that arrives in parts of these sizes, over and over."""
    pieces, given, position, turn = Pieces(limit), [], 0, 0
    while position < len(body):
        step = sizes[turn % len(sizes)]
        given += pieces.feed(body[position : position + step])
        position += step
        turn += 1
    pieces.end()
    return given


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5))
def test_pieces_are_the_batches(sizes: list[int]) -> None:
    """Each piece is a whole stream with the cells of one batch, in order, wherever the bytes were cut."""
    pieces = fed(BODY, sizes)

    assert [len(read(piece, 2**20)) for piece in pieces] == [3, 3, 3, 1]
    together = sp.vstack([read(piece, 2**20).counts for piece in pieces])
    np.testing.assert_array_equal(together.toarray(), counts(10).toarray())


@given(st.integers(0, len(BODY) - 1))
def test_cut_off(n_bytes: int) -> None:
    """A stream that ends early is refused at its end, wherever it was cut."""
    with pytest.raises(MalformedBody, match="cut off"):
        fed(BODY[:n_bytes], [1000])


@given(st.integers(0, len(BODY) - 1), st.integers(0, 255))
def test_damaged_bytes_never_crash(position: int, value: int) -> None:
    """Whatever a byte is changed to, what comes is pieces or a refusal."""
    damaged = BODY[:position] + bytes([value]) + BODY[position + 1 :]
    with contextlib.suppress(MalformedBody, BodyTooLarge):
        fed(damaged, [777])


def test_bytes_after_the_end() -> None:
    with pytest.raises(MalformedBody, match="follow the end"):
        fed(BODY + b"x", [100])


def test_a_message_that_is_too_long() -> None:
    """It is refused when its header says so, not when it has arrived."""
    pieces = Pieces(5_000)
    large = arrow_body(counts(200), GENES, rows_per_batch=200)
    with pytest.raises(BodyTooLarge):
        pieces.feed(large[:4_900])
    assert pieces.n_held < 5_000


def test_no_message_at_all() -> None:
    with pytest.raises(MalformedBody, match="does not begin as one"):
        fed(b"GET / HTTP/1.1 and so on", [100])
    schema = BODY[: 8 + struct.unpack_from("<i", BODY, 4)[0]]
    with pytest.raises(MalformedBody, match="nothing else"):
        fed(schema + schema, [100])
