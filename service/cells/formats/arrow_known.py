"""Arrow bodies and answers that look like earlier ones: only their numbers are new, and are read and written in their places.

A client sends the same schema with every request, with the names of all its genes, and is answered with the same columns. For one cell,
Arrow's reader and writer spend more on those than the model on the cell. So Arrow reads the first body with a schema and writes the first
answer of its kind. What comes later is compared with that, and left to Arrow where it differs in anything but numbers.
"""

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import scipy.sparse as sp

from service.cells.counts import csr
from service.cells.formats.arrow_limits import END, Message, Numbers, is_little_endian, next_message, numbers_of

N_KNOWN = 16
MAX_SCHEMA_BYTES = 2**22
"""Of a schema that is kept; the genes of a genome take a tenth of it."""

MAX_HEADER_BYTES = 2**12

MAX_ROWS = 16
"""Of an answer that is kept; with more cells Arrow takes hardly longer."""

_IS_LIKE_ARROW = sys.byteorder == "little"
_LIST_NODES, _LIST_BUFFERS = 2, 4
"""Arrays of a list, itself and what is in it; and buffers: nulls and offsets, nulls and values."""

_ONE, _NODES, _BUFFERS = (
    struct.Struct("<q"),
    struct.Struct(f"<{4 * _LIST_NODES}q"),
    struct.Struct(f"<{4 * _LIST_BUFFERS}q"),
)

Key = TypeVar("Key", contravariant=True)


class Known(Protocol[Key]):
    """What is kept of an earlier body or answer."""

    def is_of(self, key: Key) -> bool:
        """Whether another one is like it."""


Kept = TypeVar("Kept", bound=Known[Any])


class Latest(Generic[Kept]):
    """The last few of a kind. Several threads read bodies: what is kept is replaced as a whole."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._kept: tuple[Kept, ...] = ()

    def find(self, key: object) -> Kept | None:
        """The one that is like it."""
        return next((kept for kept in self._kept if kept.is_of(key)), None)

    def add(self, one: Kept | None) -> None:
        """Keep one more, and forget the oldest where there are too many."""
        if one is not None:
            self._kept = (one, *self._kept[: N_KNOWN - 1])


@dataclass(frozen=True)
class KnownBody:
    """A body that Arrow has read: lists of gene indices and of counts in one plain record batch, and nothing else."""

    prefix: bytes
    """The schema's message, and how long the header of the record batch is."""

    header: bytes
    """That header with zeros in the places of its numbers."""

    numbers: Numbers
    genes: tuple[str, ...]
    gene: np.dtype[Any]
    count: np.dtype[Any]

    @classmethod
    def of(cls, body: bytes, genes: tuple[str, ...], gene: np.dtype[Any], count: np.dtype[Any]) -> Self | None:
        """That of a body that has been read; None where it is not plain, its schema is long, or its numbers are not laid out as here."""
        view = memoryview(body)
        schema = _whole(next_message(view, 0))
        batch = _whole(next_message(view, schema.end))
        if not batch.is_record_batch or schema.end > MAX_SCHEMA_BYTES or len(batch.metadata) > MAX_HEADER_BYTES:
            return None
        numbers = numbers_of(batch.metadata)
        if numbers is None or (numbers.n_nodes, numbers.n_buffers) != (2 * _LIST_NODES, 2 * _LIST_BUFFERS):
            return None
        if not (_IS_LIKE_ARROW and is_little_endian(schema.metadata)):
            return None
        header = _without(numbers, bytes(batch.metadata))
        return cls(body[: batch.body - len(batch.metadata)], bytes(header), numbers, genes, gene, count)

    def is_of(self, body: bytes) -> bool:
        """Whether a body begins as this one."""
        return body.startswith(self.prefix)

    def counts(self, body: bytes) -> sp.csr_matrix | None:
        """The counts of a body that begins as this one, where they lie.

        Returns:
            None where it differs in more than its numbers, or these break a promise of the format: that is Arrow's to refuse.
        """
        start = len(self.prefix)
        header = body[start : start + len(self.header)]
        if len(header) < len(self.header) or _without(self.numbers, header) != self.header:
            return None
        at = self.numbers
        first, (n_bytes,), (n_rows,) = (
            start + len(header),
            _ONE.unpack_from(header, at.body_length),
            _ONE.unpack_from(header, at.n_rows),
        )
        if n_rows < 1 or n_bytes < 0 or len(body) != first + n_bytes + len(END) or not body.endswith(END):
            return None
        nodes, buffers = _NODES.unpack_from(header, at.nodes), _BUFFERS.unpack_from(header, at.buffers)
        places = []
        for column, dtype in enumerate((self.gene, self.count)):
            n_lists, n_null_lists, n_values, n_nulls = nodes[4 * column : 4 * column + 4]
            _, _, offsets, offsets_length, _, _, values, values_length = buffers[8 * column : 8 * column + 8]
            if n_lists != n_rows or n_null_lists or n_nulls:
                return None
            for begin, length, n_items, size in (
                (offsets, offsets_length, n_rows + 1, 4),
                (values, values_length, n_values, dtype.itemsize),
            ):
                if (
                    not (0 <= begin <= begin + length <= n_bytes and 0 <= n_items * size <= length)
                    or (first + begin) % 8
                ):
                    return None
                places.append((first + begin, n_items))
        (ends_at, n_ends), (genes_at, n_genes), (count_ends_at, _), (counts_at, n_counts) = places
        ends = np.frombuffer(body, np.int32, n_ends, ends_at)
        n_entries = int(ends[-1])
        if (
            ends[0] != 0
            or not 0 <= n_entries <= min(n_genes, n_counts)
            or (n_ends > 2 and (ends[1:] < ends[:-1]).any())
        ):
            return None
        if body[ends_at : ends_at + 4 * n_ends] != body[count_ends_at : count_ends_at + 4 * n_ends]:
            return None
        genes = np.frombuffer(body, self.gene, n_entries, genes_at)
        if n_entries and (
            np.maximum.reduce(genes) >= len(self.genes) or (self.gene.kind == "i" and np.minimum.reduce(genes) < 0)
        ):
            return None
        return csr(np.frombuffer(body, self.count, n_entries, counts_at), genes, ends, len(self.genes))


def _without(numbers: Numbers, header: bytes) -> bytearray:
    """A header with zeros in the places of those numbers."""
    zeroed = bytearray(header)
    zeroed[numbers.body_length : numbers.body_length + 8] = zeroed[numbers.n_rows : numbers.n_rows + 8] = bytes(8)
    zeroed[numbers.nodes : numbers.nodes + 16 * numbers.n_nodes] = bytes(16 * numbers.n_nodes)
    zeroed[numbers.buffers : numbers.buffers + 16 * numbers.n_buffers] = bytes(16 * numbers.n_buffers)
    return zeroed


Likeness = tuple[object, ...]


@dataclass(frozen=True)
class KnownAnswer:
    """An answer as Arrow has written it, and where in it the head and the numbers of each column stand."""

    likeness: Likeness
    content: bytes
    head: slice
    places: tuple[slice, ...]

    @classmethod
    def of(cls, likeness: Likeness, content: bytes, head: bytes, columns: Sequence[bytes]) -> Self | None:
        """That of an answer that has been written; None where it is not clear what stands where in it.

        Args:
            likeness: equal for answers that differ only in the bytes of head and columns, and not in how many those are.
            content: messages as Arrow wrote them, of which the last is a record batch.
            head: what the schema's metadata hold.
            columns: the numbers of each column, in the order of the columns.
        """
        view, position = memoryview(content), 0
        while not (message := _whole(next_message(view, position))).is_record_batch:
            position = message.end
        numbers = numbers_of(message.metadata)
        if numbers is None or message.end != len(content) or content.count(head) != 1:
            return None
        buffers = struct.unpack_from(f"<{2 * numbers.n_buffers}q", message.metadata, numbers.buffers)
        filled = [start for start, length in zip(buffers[::2], buffers[1::2], strict=True) if length]
        if len(filled) != len(columns):
            return None
        places = tuple(
            slice(message.body + start, message.body + start + len(column))
            for start, column in zip(filled, columns, strict=True)
        )
        start = content.index(head)
        known = cls(likeness, content, slice(start, start + len(head)), places)
        return known if known.filled(head, columns) == content else None

    def is_of(self, likeness: Likeness) -> bool:
        """Whether another answer is like it."""
        return self.likeness == likeness

    def filled(self, head: bytes, columns: Sequence[bytes]) -> bytes:
        """The bytes that Arrow would write for another head and other numbers."""
        content = bytearray(self.content)
        content[self.head] = head
        for place, column in zip(self.places, columns, strict=True):
            content[place] = column
        return bytes(content)


def _whole(message: Message | int) -> Message:
    assert not isinstance(message, int), "Arrow has written whole messages"
    return message


known_bodies: Latest[KnownBody] = Latest()
known_answers: Latest[KnownAnswer] = Latest()
