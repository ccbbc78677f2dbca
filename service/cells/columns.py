"""Answers as columns with one entry per cell: what tasks give and formats write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
class Names:
    """Some words per cell, in an order that means something."""

    codes: NDArray[np.int32]
    """Shape (n_cells, n_words): indices into `words`."""

    words: tuple[str, ...]


Column = Values | Vectors | Labels | Names
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


def _array(column: Column) -> NDArray[Any]:
    return column.codes if isinstance(column, Labels | Names) else column.values


def _replaced(column: Column, arrays: Sequence[NDArray[Any]]) -> Column:
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if isinstance(column, Labels | Names):
        return type(column)(array.astype(np.int32, copy=False), column.words)
    if isinstance(column, Vectors):
        return Vectors(array.astype(np.float32, copy=False), column.names)
    return Values(array)
