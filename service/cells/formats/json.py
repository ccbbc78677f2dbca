"""application/json: for people and curl. Genes by name, and per cell a list of counts or a map of the counts that are not zero."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import scipy.sparse as sp

from service.cells.columns import Columns, Labels, Names, Vectors, n_cells
from service.cells.counts import Cells
from service.cells.formats.format import Format, check_names
from service.contract import strict_json
from service.errors import InvalidCells, MalformedBody, NoCells

FIELDS = ("genes", "cells", "cell_ids")


def read(body: bytes, max_decoded_bytes: int) -> Cells:  # noqa: ARG001 - JSON cannot grow by decoding
    """Cells of a JSON body.

    Raises:
        MalformedBody: not JSON, with line and column.
        InvalidCells: JSON, but not the documented object; names the field, cell or gene.
        NoCells: `cells` is empty.
    """
    try:
        document = strict_json.loads(body)
    except ValueError as error:
        raise MalformedBody(problem=f"The body is not valid JSON: {error}.{_csv_hint(body[:4000])}") from None
    if not isinstance(document, dict):
        raise InvalidCells(
            problem=f"The body must be an object with 'genes' and 'cells', not a {type(document).__name__}."
        )
    if unknown := sorted(set(document) - set(FIELDS)):
        raise InvalidCells(problem=f"Unknown field {unknown[0][:60]!r}. The fields are: {', '.join(FIELDS)}.")
    if "genes" not in document or "cells" not in document:
        found = ", ".join(repr(name) for name in document) or "nothing"
        raise InvalidCells(problem=f"The body must have 'genes' (all that were measured) and 'cells'; found {found}.")
    genes = check_names(document["genes"], "genes")
    rows = document["cells"]
    if not isinstance(rows, list):
        hint = _csv_hint(rows[:4000].encode()) if isinstance(rows, str) else ""
        raise InvalidCells(
            problem=f"'cells' must be a list with one entry per cell, not a {type(rows).__name__}.{hint}"
        )
    if not rows:
        raise NoCells
    cell_ids = check_names(document["cell_ids"], "cell_ids") if document.get("cell_ids") is not None else None
    if cell_ids is not None and len(cell_ids) != len(rows):
        raise InvalidCells(problem=f"'cell_ids' has {len(cell_ids):,} names for {len(rows):,} cells.")
    return Cells(genes=genes, counts=_counts(rows, genes), cell_ids=cell_ids)


def _counts(rows: list[Any], genes: tuple[str, ...]) -> sp.csr_matrix:
    column_of = {gene: column for column, gene in reversed(list(enumerate(genes)))}
    indices, values = [], []
    for number, row in enumerate(rows):
        if isinstance(row, list):
            if len(row) != len(genes):
                raise InvalidCells(problem=f"Cell {number} has {len(row):,} counts for {len(genes):,} genes.")
            dense = _numbers(row, number, genes)
            columns = np.flatnonzero(dense)
            indices.append(columns)
            values.append(dense[columns])
        elif isinstance(row, dict):
            try:
                columns = np.array([column_of[gene] for gene in row], dtype=np.int64)
            except KeyError as error:
                raise InvalidCells(
                    problem=f"Cell {number} has a count for {str(error.args[0])[:60]!r}, which 'genes' does not list."
                ) from None
            indices.append(columns)
            values.append(_numbers(list(row.values()), number, tuple(row)))
        else:
            raise InvalidCells(
                problem=f"Cell {number} must be a list of counts or an object of gene: count, not {str(row)[:40]!r}."
            )
    return sp.csr_matrix(
        (np.concatenate(values), np.concatenate(indices), np.cumsum([0, *map(len, indices)])),
        shape=(len(rows), len(genes)),
    )


def _numbers(values: list[Any], cell: int, genes: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    # A boolean is an int to Python and a string of digits is a number to numpy; neither is a count.
    if not {type(value) for value in values} <= {int, float}:
        at = next(i for i, value in enumerate(values) if type(value) not in (int, float))
        raise InvalidCells(
            problem=f"Cell {cell}: the count of gene {genes[at][:60]!r} must be a number, not {str(values[at])[:40]!r}."
        )
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        raise InvalidCells(problem=f"Cell {cell} has a number beyond every count.") from None


def _csv_hint(start: bytes) -> str:
    first_line = start.split(b"\n", 1)[0]
    for separator, name in ((b",", "CSV"), (b"\t", "a tab-separated table")):
        if first_line.count(separator) >= 2 and not first_line.lstrip().startswith((b"{", b"[")):
            return (
                f" It looks like {name}. Put the column names into 'genes' and each row of counts into 'cells':"
                ' {"genes": ["CD3D", "LYZ"], "cells": [[3, 0], [0, 12]]}; the Python client and `cellserve` read tables and AnnData.'
            )
    return ""


class JsonWriter:
    """Writes {…head…, "cells": [one object per cell]}, one line per cell; float32 in its shortest exact form."""

    def __init__(self) -> None:
        self._is_first = True

    def start(self, head: dict[str, Any]) -> bytes:
        """The head, and the opening of the list of cells."""
        return orjson.dumps(head)[:-1] + b',"cells":['

    def write(self, columns: Columns, cell_ids: Sequence[str] | None) -> bytes:
        """One object per cell: named vectors as maps, others as lists."""
        # Only rows that lie in one piece can be written as they are.
        columns = {
            name: Vectors(np.ascontiguousarray(column.values), column.names) if isinstance(column, Vectors) else column
            for name, column in columns.items()
        }
        lines = []
        for row in range(n_cells(columns)):
            cell: dict[str, Any] = {} if cell_ids is None else {"cell_id": cell_ids[row]}
            for name, column in columns.items():
                if isinstance(column, Labels):
                    cell[name] = column.words[column.codes[row]]
                elif isinstance(column, Names):
                    cell[name] = [column.words[code] for code in column.codes[row]]
                elif isinstance(column, Vectors) and column.names is not None:
                    cell[name] = dict(zip(column.names, column.values[row], strict=True))
                else:
                    cell[name] = column.values[row]
            lines.append(orjson.dumps(cell, option=orjson.OPT_SERIALIZE_NUMPY))
        lead = b"\n" if self._is_first else b",\n"
        self._is_first = False
        return lead + b",\n".join(lines)

    def end(self) -> bytes:
        """The closing of list and object."""
        return b"\n]}\n"


_COUNT = {"type": "number", "minimum": 0, "description": "Raw count: a whole number."}
_NAME = {"type": "string", "minLength": 1, "maxLength": 256}
FORMAT = Format(
    media_type="application/json",
    read=read,
    writer=JsonWriter,
    description="An object with `genes` (all genes that were measured) and `cells`, each a list of counts in the order of `genes` or "
    "an object of gene: count in which genes that are left out count zero; optionally `cell_ids`.",
    schema={
        "type": "object",
        "required": ["genes", "cells"],
        "additionalProperties": False,
        "properties": {
            "genes": {"type": "array", "items": _NAME, "minItems": 1},
            "cells": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "oneOf": [
                        {"type": "array", "items": _COUNT},
                        {"type": "object", "additionalProperties": _COUNT},
                    ]
                },
            },
            "cell_ids": {"type": "array", "items": _NAME, "minItems": 1},
        },
    },
)
