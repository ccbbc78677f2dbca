"""Answers that were computed before, one packed record per cell, the least recently used going first.

All columns of a cell are one run of bytes, so a hit is a copy of what the runtime gave: there is nothing that could make other bits of it.
"""

import asyncio
import contextlib
import itertools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import metrics
from service.cells.columns import Columns, arrays, with_arrays
from service.inference.fingerprints import Words, model_prefix
from service.inference.model import Model
from service.inference.work import Work


@dataclass(frozen=True)
class Layout:
    """How the columns of an answer lie in a record: all that a column has besides its values stands here once."""

    record: np.dtype[Any]
    empty: Columns
    """The columns of no cell."""

    @classmethod
    def of(cls, columns: Columns) -> "Layout":
        """The layout of an answer."""
        values = arrays(columns)
        return cls(
            record=np.dtype([(name, array.dtype, array.shape[1:]) for name, array in values.items()]),
            empty=with_arrays(
                columns, {name: np.empty((0, *array.shape[1:]), array.dtype) for name, array in values.items()}
            ),
        )

    def is_of(self, columns: Columns) -> bool:
        """Whether these columns have this layout, down to the names within them."""
        return self.record == Layout.of(columns).record and _about(self.empty) == _about(columns)

    def pack(self, columns: Columns) -> list[bytes]:
        """One record per cell."""
        values = arrays(columns)
        packed = np.empty(len(next(iter(values.values()))), dtype=self.record)
        for name, array in values.items():
            packed[name] = array
        records: list[bytes] = packed.view(np.dtype(("V", self.record.itemsize))).tolist()
        return records

    def unpack(self, records: Sequence[bytes]) -> Columns:
        """The columns of these records."""
        packed = np.frombuffer(b"".join(records), dtype=self.record)
        return with_arrays(self.empty, {name: np.ascontiguousarray(packed[name]) for name in self.empty})

    @property
    def n_bytes(self) -> int:
        """About what it holds; the names themselves belong to the model."""
        return 1024 + sum(sys.getsizeof(value) for _, *more in _about(self.empty).values() for value in more)


def _about(columns: Columns) -> dict[str, list[Any]]:
    """All of a column that is not one entry per cell."""
    return {
        name: [
            type(column),
            *(value for field in fields(column) if not isinstance(value := getattr(column, field.name), np.ndarray)),
        ]
        for name, column in columns.items()
    }


@dataclass(frozen=True)
class Question:
    """What is asked of cells: the loaded model, the task and its options, as a cache knows them."""

    model_number: int
    of_genes: NDArray[np.uint64]
    of_question: NDArray[np.uint64]

    @property
    def layout_key(self) -> bytes:
        """Of the layout of its answers; longer than the key of any cell."""
        return model_prefix(self.model_number) + self.of_question.tobytes() + b"layout"


class AnswerCache:
    """Belongs to one event loop; every method is called from it.

    A loaded model is its own part of the key, so neither a version of the same name nor the same version loaded again can be given another's
    answers; what a model has here goes when the model leaves memory.
    """

    def __init__(self, max_bytes: int) -> None:
        """Begin empty; keys, records and what Python needs to hold them are at most `max_bytes`."""
        self._max_bytes = max_bytes
        self._words = Words()
        self._entries: OrderedDict[bytes, bytes | Layout] = OrderedDict()
        self._n_bytes_held = 0
        self._models: dict[int, tuple[weakref.ref[Model], int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Cells and layouts that are held."""
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """All that is held: keys, records, and the table that finds them."""
        return self._n_bytes_held + sys.getsizeof(self._entries)

    def question(self, work: Work) -> Question:
        """What the keys of cells are made with."""
        asked = f"{work.model.id} {work.task.name} {work.options.model_dump_json()}"
        return Question(
            model_number=self._number(work.model),
            of_genes=self._words.of_genes(work.model.manifest.genes.n_genes),
            of_question=self._words.of_text(asked),
        )

    def find(self, question: Question, keys: Sequence[bytes]) -> tuple[Layout | None, list[bytes | None]]:
        """The records of these cells, which count as used now; None where there is none."""
        layout = self._entries.get(question.layout_key)
        if not isinstance(layout, Layout):
            return None, [None] * len(keys)
        records = [self._entries.get(key) for key in keys]
        for key, record in zip(keys, records, strict=True):
            if record is not None:
                self._entries.move_to_end(key)
        # After its records, so that it never goes before one of them.
        self._entries.move_to_end(question.layout_key)
        return layout, records  # type: ignore[return-value]  # the keys of layouts are longer

    def put(self, question: Question, layout: Layout, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Keep the records of these cells, and let the oldest go where there is no room."""
        for key, record in zip(keys, records, strict=True):
            self._keep(key, record)
        self._keep(question.layout_key, layout)
        n_evicted = 0
        while self._entries and self.n_bytes > self._max_bytes:
            key, value = self._entries.popitem(last=False)
            self._n_bytes_held -= _size(key, value)
            n_evicted += isinstance(value, bytes)
        metrics.CACHE_EVICTIONS.inc(n_evicted)
        metrics.CACHE_BYTES.set(self.n_bytes)

    def _keep(self, key: bytes, value: bytes | Layout) -> None:
        before = self._entries.get(key)
        if before is not None:
            self._n_bytes_held -= _size(key, before)
        self._entries[key] = value
        self._entries.move_to_end(key)
        self._n_bytes_held += _size(key, value)

    def _number(self, model: Model) -> int:
        held, number = self._models.get(id(model), (None, -1))
        if held is not None and held() is model:
            return number
        number, identity = next(self._numbers), id(model)
        loop = asyncio.get_running_loop()

        def gone(_: object) -> None:
            # A model may end in any thread, and within anything: no more is done there than to say so.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._drop, identity, number)

        self._models[identity] = weakref.ref(model, gone), number
        return number

    def _drop(self, identity: int, number: int) -> None:
        """Forget everything of a model that has left."""
        if self._models.get(identity, (None, -1))[1] == number:
            del self._models[identity]
        prefix = model_prefix(number)
        gone = [item for item in self._entries.items() if item[0].startswith(prefix)]
        self._n_bytes_held -= sum(_size(key, value) for key, value in gone)
        # A new table: one from which entries are taken stays as large as it was.
        self._entries = OrderedDict(item for item in self._entries.items() if not item[0].startswith(prefix))
        metrics.CACHE_BYTES.set(self.n_bytes)


def _size(key: bytes, value: bytes | Layout) -> int:
    """Bytes that an entry takes besides its place in the table."""
    return sys.getsizeof(key) + (sys.getsizeof(value) if isinstance(value, bytes) else value.n_bytes)
