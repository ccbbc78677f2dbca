"""Answers as columns with one entry per cell: what tasks give and formats write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Values:
    """One number or truth value per cell."""

    values: NDArray[np.float32] | NDArray[np.bool_]
    """Shape (n_cells,)."""


@dataclass(frozen=True)
class Vectors:
    """One vector per cell, its components named or not."""

    values: NDArray[np.float32]
    """Shape (n_cells, n_components)."""

    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Labels:
    """One of a few words per cell."""

    codes: NDArray[np.int32]
    """Shape (n_cells,): indices into `words`."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class LabelLists:
    """Several words per cell, in an order that means something."""

    codes: NDArray[np.int32]
    """Shape (n_cells, n_most): indices into `words`; -1 after a cell's last."""

    words: tuple[str, ...]
    is_ragged: bool = False
    """Whether a cell may have fewer words than another; where not, no code is -1."""

    def lists(self) -> list[list[str]]:
        """The words of each cell."""
        return [[self.words[code] for code in row if code >= 0] for row in self.codes]

    def used(self) -> "LabelLists":
        """The same with only the words that occur: the names of all reference cells would outweigh a small answer."""
        used, codes = np.unique(self.codes, return_inverse=True)
        n_none = int(len(used) > 0 and used[0] < 0)
        renumbered = np.asarray(codes.reshape(self.codes.shape) - n_none, dtype=np.int32)
        return LabelLists(renumbered, tuple(self.words[code] for code in used[n_none:]), self.is_ragged)


Column = Values | Vectors | Labels | LabelLists
Columns = Mapping[str, Column]


def n_cells(columns: Columns) -> int:
    """Number of cells that the columns describe."""
    first = next(iter(columns.values()))
    return len(_array(first))


def take(columns: Columns, start: int, stop: int) -> Columns:
    """The cells from `start` up to `stop`."""
    return {name: _replaced(column, [_array(column)[start:stop]]) for name, column in columns.items()}


def concatenate(parts: Sequence[Columns]) -> Columns:
    """Columns of the same names and kinds, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return {name: _replaced(column, [_array(part[name]) for part in parts]) for name, column in parts[0].items()}


def arrays(columns: Columns) -> dict[str, NDArray[Any]]:
    """What each column holds per cell."""
    return {name: _array(column) for name, column in columns.items()}


def with_arrays(columns: Columns, values: Mapping[str, NDArray[Any]]) -> Columns:
    """Columns of the same names and kinds that hold other cells."""
    return {name: _replaced(column, [values[name]]) for name, column in columns.items()}


def _array(column: Column) -> NDArray[Any]:
    return column.codes if isinstance(column, Labels | LabelLists) else column.values


def _replaced(column: Column, arrays: Sequence[NDArray[Any]]) -> Column:
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if isinstance(column, Labels | LabelLists):
        return replace(column, codes=array.astype(np.int32, copy=False))
    if isinstance(column, Vectors):
        return Vectors(array.astype(np.float32, copy=False), column.names)
    return Values(array)
