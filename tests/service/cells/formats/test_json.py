"""JSON bodies and answers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.columns import LabelLists, Labels, Values, Vectors
from service.cells.counts import check_raw
from service.cells.formats import format as wire_format
from service.cells.formats.json import JsonWriter, read
from service.errors import CellserveError, InvalidCells, MalformedBody, NoCells, NotRawCounts
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


def test_text_that_is_no_unicode() -> None:
    """Half a surrogate pair, which JSON can write and UTF-8 cannot, is refused wherever it stands."""
    for document in (
        rb'{"genes": ["\ud800"], "cells": [[1]]}',
        rb'{"genes": ["A"], "cells": "\ud800"}',
        rb'{"genes": ["A"], "cells": ["\ud800"]}',
        rb'{"genes": ["A"], "cells": [["\ud800"]]}',
        rb'{"genes": ["A"], "cells": [{"\ud800": 1}]}',
        rb'{"genes": ["A"], "cells": [[1]], "cell_ids": ["\ud800"]}',
        rb'{"genes": ["A"], "cells": [[1]], "\ud800": 1}',
    ):
        with pytest.raises((MalformedBody, InvalidCells)) as refused:
            read(document, 0)
        assert str(refused.value).encode()


@pytest.mark.parametrize("depth", [900, 985, 990, 5_000, 100_000])
@pytest.mark.parametrize("around", ['{"genes": [%s], "cells": [[1]]}', '{"genes": ["A"], "cells": [[%s]]}', "%s"])
def test_depth(depth: int, around: str) -> None:
    """Nesting of any depth at any place is refused with a short message."""
    with pytest.raises((MalformedBody, InvalidCells)) as refused:
        read((around % ("[" * depth + "]" * depth)).encode(), 0)
    assert len(str(refused.value)) < 300


def test_endless_words_leave_the_message_short() -> None:
    """A name, a field, a count or a key of a megabyte is refused in a few words."""
    long = "x" * 10**6
    for document in (
        body(genes=[long, "B"]),
        body(cell_ids=[long, "y"]),
        body(cells=[[1, long]]),
        body(cells=[{long: 1}]),
        body(cells=[long]),
        body(cells=long),
        body(**{long: 1}),
        b'{"genes": ["A"], "cells": [{"' + long.encode() + b'": 1, "' + long.encode() + b'": 2}]}',
    ):
        with pytest.raises((MalformedBody, InvalidCells)) as refused:
            read(document, 0)
        assert len(str(refused.value)) < 400


def test_more_genes_than_a_genome() -> None:
    """A million names are refused with both numbers."""
    genes = json.dumps([f"G{number}" for number in range(wire_format.MAX_GENES + 1)]).encode()
    with pytest.raises(InvalidCells, match=r"200,001 names; no genome has more than 200,000"):
        read(b'{"genes": ' + genes + b', "cells": [{}]}', 0)


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "\x1b[31m", "\0", "a\u2028b", "a\u200bb", "\u202egnp", "", "n" * 257])
@pytest.mark.parametrize("field", ["genes", "cell_ids"])
def test_names_that_do_not_print(field: str, name: str) -> None:
    """Control characters, invisible characters, the empty word and words over 256 characters are no names."""
    with pytest.raises(InvalidCells, match=rf"'{field}'\[1\] must be a printable name") as refused:
        read(body(**{field: ["A", name]}), 0)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["n" * 256, "γδ T", "RP11-885N19.6", "a b", "'", '"', "\\", "{}", "基因"])
def test_names_that_do(name: str) -> None:
    """Words of any script with spaces and signs are names."""
    cells = read(body(genes=[name, "B"], cells=[{name: 1}], cell_ids=[name]), 0)
    assert (cells.genes, cells.cell_ids) == ((name, "B"), (name,))


def test_a_gene_twice() -> None:
    """Of two columns of one name a list fills both, and a map the first."""
    cells = read(b'{"genes": ["A", "A"], "cells": [[1, 2], {"A": 3}]}', 0)
    assert cells.counts.toarray().tolist() == [[1, 2], [3, 0]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_list_is_a_map(data: st.DataObject) -> None:
    """Cells as lists and cells as maps, in any order of their genes, are the same cells."""
    n_cells, n_genes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    genes = [f"G{number}" for number in range(n_genes)]
    row = st.lists(st.integers(0, 3), min_size=n_genes, max_size=n_genes)
    rows = data.draw(st.lists(row, min_size=n_cells, max_size=n_cells))
    order = data.draw(st.permutations(range(n_genes)))
    maps = [{genes[at]: row[at] for at in order if row[at]} for row in rows]
    dense = read(json.dumps({"genes": genes, "cells": rows}).encode(), 0)
    sparse = read(json.dumps({"genes": genes, "cells": maps}).encode(), 0)

    assert dense.counts.toarray().tolist() == sparse.counts.toarray().tolist() == rows
    assert check_raw(dense) == check_raw(sparse)


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
def test_numbers_beyond_floats_are_named(number: str) -> None:
    """A number beyond float64 is refused with its cell and gene."""
    with pytest.raises(NotRawCounts, match=r"^Cell 1 has 1 not finite value\(s\), first -?inf at gene B\."):
        check_raw(read(b'{"genes": ["A", "B"], "cells": [[1, 1], [1, %s]]}' % number.encode(), 0))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["A", "B", "genes", "\ud800"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["genes", "cells", "cell_ids", "A", "B"]), inner, max_size=4)
            | st.fixed_dictionaries({"genes": st.just(["A", "B"]), "cells": st.lists(inner, max_size=3)})
        ),
        max_leaves=12,
    )
)
def test_any_document(document: object) -> None:
    """Any JSON gives cells or a refusal that can be sent, and never another error."""
    try:
        cells = read(json.dumps(document).encode(), 0)
    except CellserveError as error:
        error.detail.encode()  # can be sent
    else:
        assert cells.counts.shape == (len(cells), len(cells.genes))


def test_an_answer_cut_anywhere() -> None:
    """No part of an answer but the whole is JSON, so that an incomplete one cannot be taken for it."""
    columns = {"label": Labels(np.array([1, 0], np.int32), ("no", "yes")), "score": Values(np.ones(2, np.float32))}
    writer = JsonWriter()
    text = writer.start({"model": "m"}) + writer.write(columns, ("a", "b")) + writer.end()
    for end in range(len(text) - 1):  # the last byte is a line break
        with pytest.raises(json.JSONDecodeError):
            json.loads(text[:end])
    assert len(json.loads(text)["cells"]) == 2


def test_an_answer_has_a_line_per_cell() -> None:
    """One cell stands on one line, so that answers can be read as they arrive."""
    columns = {
        "flag": Values(np.array([True, False])),
        "v": Vectors(np.zeros((2, 2), np.float32)),
        "near": LabelLists(np.array([[1, 0], [1, 1]], np.int32), ("a", "b")),
    }
    writer = JsonWriter()
    lines = (writer.start({"model": "m"}) + writer.write(columns, None) + writer.end()).decode().splitlines()
    cells = ['{"flag":true,"v":[0.0,0.0],"near":["b","a"]},', '{"flag":false,"v":[0.0,0.0],"near":["b","b"]}']
    assert lines == ['{"model":"m","cells":[', *cells, "]}"]


def test_answers_of_any_layout() -> None:
    """Columns cut out of a larger array are written as any others."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for array in (np.asfortranarray(values), values[:, ::2], values[:, [2, 0]], values[::-1]):
        writer = JsonWriter()
        text = writer.start({"model": "m"}) + writer.write({"v": Vectors(array)}, None) + writer.end()
        assert [cell["v"] for cell in json.loads(text)["cells"]] == array.tolist()
