"""Some words per cell, in every format that answers are written in."""

import json

import numpy as np

from service.cells.columns import Names, concatenate, n_cells, take
from service.cells.formats.arrow import ArrowWriter
from service.cells.formats.json import JsonWriter
from service.cells.formats.tensors import describe, write
from service.client import read_answer

COLUMN = Names(np.array([[2, 0], [1, 2], [0, 1]], dtype=np.int32), ("a", "bé", "c"))
WORDS = [["c", "a"], ["bé", "c"], ["a", "bé"]]


def test_json() -> None:
    """A list per cell."""
    writer = JsonWriter()
    document = json.loads(writer.start({"task": "t"}) + writer.write({"top": COLUMN}, None) + writer.end())
    assert [cell["top"] for cell in document["cells"]] == WORDS


def test_arrow() -> None:
    """Lists of one length over one dictionary, batch after batch."""
    writer = ArrowWriter()
    parts = [writer.write(take({"top": COLUMN}, start, stop), None) for start, stop in ((0, 2), (2, 3))]
    table = read_answer(writer.start({}) + b"".join(parts) + writer.end())
    assert table["top"].to_pylist() == WORDS


def test_tensors() -> None:
    """BYTES of two axes, as JSON and as bytes."""
    assert describe(COLUMN) == ("BYTES", (3, 2))
    body, _ = write({}, [("top", COLUMN, False)])
    assert json.loads(body)["outputs"][0]["data"] == [word for row in WORDS for word in row]
    body, size = write({}, [("top", COLUMN, True)])
    assert body[size:] == b"".join(len(w.encode()).to_bytes(4, "little") + w.encode() for row in WORDS for w in row)


def test_parts() -> None:
    """Taken apart and put together it is what it was."""
    parts = [take({"top": COLUMN}, start, stop) for start, stop in ((0, 1), (1, 3))]
    whole = concatenate(parts)["top"]
    assert [n_cells(part) for part in parts] == [1, 2]
    assert whole.codes.tolist() == COLUMN.codes.tolist()
    assert whole.words == COLUMN.words
