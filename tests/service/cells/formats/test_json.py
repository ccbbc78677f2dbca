"""JSON bodies and answers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.columns import Labels, Values, Vectors
from service.cells.formats.json import JsonWriter, read
from service.errors import InvalidCells, MalformedBody, NoCells
from tests.builders import counts, gene_table, json_body

GENES = gene_table().gene_symbol


def body(**changes: object) -> bytes:
    return json.dumps({"genes": ["A", "B"], "cells": [[1, 2], {"B": 3}], **changes}).encode()


def test_lists_and_maps() -> None:
    """A list is in the order of the genes, a map names its genes, and what it leaves out is zero."""
    cells = read(body(cell_ids=["x", "y"]), 0)

    assert cells.counts.toarray().tolist() == [[1, 2], [0, 3]]
    assert (cells.genes, cells.cell_ids) == (("A", "B"), ("x", "y"))


def test_round_trip() -> None:
    """Cells written by the builder are read back."""
    matrix = counts(20)
    np.testing.assert_array_equal(read(json_body(matrix, GENES), 0).counts.toarray(), matrix.toarray())


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"nonsense", "line 1 column 1"),
        (b'{"genes": ["A"]', "line 1 column"),
        (body() + b"x", "Extra data"),
        (b"\xff\xfe", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"genes": ["A"], "genes": ["B"], "cells": [[1]]}', "'genes' occurs twice"),
        (b'{"genes": ["A"], "cells": [{"A": 1, "A": 2}]}', "'A' occurs twice"),
        (b'{"genes": ["A"], "cells": [[NaN]]}', "NaN is not"),
        (b'{"genes": ["A"], "cells": [[Infinity]]}', "Infinity is not"),
        (b"A,B,C\n1,2,3", "looks like CSV"),
        (b"A\tB\tC\n1\t2\t3", "tab-separated"),
    ],
)
def test_what_is_no_json(content: bytes, found: str) -> None:
    """Each way of not being JSON is said, with the place."""
    with pytest.raises(MalformedBody, match=found):
        read(content, 0)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (body(extra=1), "Unknown field 'extra'"),
        (b'{"cells": [[1]]}', "must have 'genes'"),
        (b'{"genes": ["A"]}', "must have 'genes'"),
        (body(genes=[]), "not empty"),
        (body(genes="A"), "list of names"),
        (body(genes=["A", 3]), r"'genes'\[1\]"),
        (body(genes=["A", ""]), r"'genes'\[1\]"),
        (body(genes=["A\n", "B"]), r"'genes'\[0\]"),
        (body(genes=["A", "b" * 300]), r"'genes'\[1\]"),
        (body(cells={"A": 1}), "must be a list"),
        (body(cells="CD3D,LYZ,MS4A1\n1,2,3"), "looks like CSV"),
        (body(cells=[[1, 2, 3]]), "Cell 0 has 3 counts for 2 genes"),
        (body(cells=[[1, 2], [1]]), "Cell 1 has 1 counts for 2 genes"),
        (body(cells=[{"C": 1}]), "'C', which 'genes' does not list"),
        (body(cells=[[1, "2"]]), "the count of gene 'B' must be a number, not '2'"),
        (body(cells=[[True, 2]]), "gene 'A' must be a number, not 'True'"),
        (body(cells=[{"A": None}]), "gene 'A' must be a number, not 'None'"),
        (body(cells=[3]), "Cell 0 must be a list"),
        (body(cells=[None]), "Cell 0 must be a list"),
        (body(cell_ids=["x"]), "1 names for 2 cells"),
        (body(cell_ids=["x", 7]), r"'cell_ids'\[1\]"),
        (b'{"genes": ["A"], "cells": [[' + b"9" * 350 + b"]]}", "beyond every count"),
    ],
)
def test_what_is_not_the_documented_object(content: bytes, found: str) -> None:
    """Each way of not being cells is said, with field, cell or gene."""
    with pytest.raises(InvalidCells, match=found):
        read(content, 0)


def test_no_cells() -> None:
    """An empty list of cells is no request."""
    with pytest.raises(NoCells):
        read(body(cells=[]), 0)


def test_numbers_beyond_floats_reach_the_check() -> None:
    """1e400 is infinite and 1e-400 is zero: the raw-count check names the first, the second is a zero."""
    cells = read(b'{"genes": ["A", "B"], "cells": [{"A": 1e400, "B": 1e-400}]}', 0)
    assert cells.counts.toarray().tolist() == [[np.inf, 0]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_answers_hold_float32_exactly(values: list[float]) -> None:
    """Every float32 comes back from the text of an answer bit for bit, in vectors, values and maps."""
    array = np.array(values, dtype=np.float32)
    names = tuple(f"n{number}" for number in range(len(values)))
    columns = {"v": Vectors(array[None, :]), "m": Vectors(array[None, :], names), "s": Values(array[:1])}
    writer = JsonWriter()
    cell = json.loads(writer.start({"k": 1}) + writer.write(columns, None) + writer.end())["cells"][0]

    assert np.array(cell["v"], dtype=np.float32).tobytes() == array.tobytes()
    assert np.array(list(cell["m"].values()), dtype=np.float32).tobytes() == array.tobytes()
    assert np.float32(cell["s"]).tobytes() == array[:1].tobytes()


def test_an_answer_in_pieces() -> None:
    """Pieces join to one document; before the end it is no JSON."""
    columns = {"label": Labels(np.array([1, 0], np.int32), ("no", "yes"))}
    writer = JsonWriter()
    text = writer.start({"model": "m"}) + writer.write(columns, ("a", "b")) + writer.write(columns, ("c", "d"))
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)

    document = json.loads(text + writer.end())
    assert document["model"] == "m"
    assert [(cell["cell_id"], cell["label"]) for cell in document["cells"]] == [
        ("a", "yes"),
        ("b", "no"),
        ("c", "yes"),
        ("d", "no"),
    ]
