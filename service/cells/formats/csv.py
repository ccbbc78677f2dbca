"""text/csv: answers as a table with one row per cell, for spreadsheets and data frames (RFC 4180). Not read."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from service.cells.columns import Column, Columns, LabelLists, Labels, Vectors, n_cells
from service.cells.formats.format import Format

_FORMULA = re.compile(r"[=+\-@\t\r]")
"""What makes a spreadsheet take a word for a formula, and run it."""


class CsvWriter:
    """Writes a header and one line per cell: `cell_id`, then a field per value; float32 in its shortest exact form."""

    def __init__(self) -> None:
        self._n_written = 0

    def start(self, head: dict[str, Any]) -> bytes:  # noqa: ARG002 - a table has no place for it
        """Nothing yet: the columns are known with the first cells."""
        return b""

    def write(self, columns: Columns, cell_ids: Sequence[str] | None) -> bytes:
        """Lines, after the header where they are the first; cells without a name are numbered from 0."""
        lines = []
        if not self._n_written:
            header = [name for key, column in columns.items() for name in _names(key, column)]
            lines.append(",".join(["cell_id", *map(_word, header)]))
        fields = [_fields(column) for column in columns.values()]
        for row in range(n_cells(columns)):
            cell = str(self._n_written + row) if cell_ids is None else _word(cell_ids[row])
            lines.append(",".join([cell, *(of_column[row] for of_column in fields)]))
        self._n_written += n_cells(columns)
        return "".join(f"{line}\r\n" for line in lines).encode()

    def end(self) -> bytes:
        """Nothing: whether all cells are there shows in their number, and in the end of the HTTP answer."""
        return b""


def _names(key: str, column: Column) -> list[str]:
    if isinstance(column, LabelLists) and not column.is_ragged:
        return [f"{key}_{place}" for place in range(column.codes.shape[1])]
    if not isinstance(column, Vectors):
        return [key]
    parts = column.names if column.names is not None else range(column.values.shape[1])
    return [f"{key}_{part}" for part in parts]


def _fields(column: Column) -> list[str]:
    """The text of a column, one entry per cell."""
    if isinstance(column, Labels):
        words = [_word(word) for word in column.words]
        return [words[code] for code in column.codes]
    if isinstance(column, LabelLists):
        # As many fields as a cell has words, or one field of all where their number differs from cell to cell.
        return [_word("|".join(row)) if column.is_ragged else ",".join(map(_word, row)) for row in column.lists()]
    values = np.ascontiguousarray(column.values)
    rows = values if isinstance(column, Vectors) else values.reshape(-1, 1)
    # JSON's null is a number that there is none for: an empty field.
    return [orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().replace("null", "") for row in rows]


def _word(word: str) -> str:
    """A word as a field: quoted where it must be, and after an apostrophe where a spreadsheet would run it."""
    if _FORMULA.match(word):
        word = f"'{word}"
    return '"' + word.replace('"', '""') + '"' if any(mark in word for mark in ',"\r\n') else word


FORMAT = Format(
    media_type="text/csv",
    writer=CsvWriter,
    description="One row per cell, `cell_id` first; a column per component of a vector (`latent_0`, `probabilities_B cell`) and per word of a "
    "list; words of lists that are not all equally long share a column, with `|` between them. There is no room for the "
    "head. A word that a spreadsheet would run as a formula (it begins with `=`, `+`, `-`, `@`) stands after an apostrophe.",
    schema={"type": "string"},
)
