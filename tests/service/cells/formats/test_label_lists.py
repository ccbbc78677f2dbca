"""Several words per cell, in every format that answers are written in."""

import io
import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np

from service.cells.columns import LabelLists, concatenate, n_cells, take
from service.cells.formats.arrow import ArrowWriter
from service.cells.formats.csv import CsvWriter
from service.cells.formats.h5ad import ColumnsWriter
from service.cells.formats.json import JsonWriter
from service.cells.formats.tensors import describe, write
from service.cells.hdf5 import answer_file
from service.client import read_answer

COLUMN = LabelLists(np.array([[2, 0], [1, 2], [0, 1]], dtype=np.int32), ("a", "bé", "c"))
WORDS = [["c", "a"], ["bé", "c"], ["a", "bé"]]
RAGGED = LabelLists(np.array([[2, 0], [-1, -1], [1, -1]], dtype=np.int32), ("a", "bé", "c"), is_ragged=True)
SETS = [["c", "a"], [], ["bé"]]


def test_json() -> None:
    """A list per cell."""
    writer = JsonWriter()
    document = json.loads(writer.start({"task": "t"}) + writer.write({"top": COLUMN}, None) + writer.end())
    assert [cell["top"] for cell in document["cells"]] == WORDS


def test_arrow() -> None:
    """Lists of one length, or of any, batch after batch."""
    writer = ArrowWriter()
    parts = [writer.write(take({"top": COLUMN}, start, stop), None) for start, stop in ((0, 2), (2, 3))]
    table = read_answer(writer.start({}) + b"".join(parts) + writer.end())
    assert table["top"].to_pylist() == WORDS


def test_arrow_of_any_length() -> None:
    """The number of words may differ from cell to cell, and from batch to batch."""
    writer = ArrowWriter()
    parts = [writer.write(take({"set": RAGGED}, start, stop), None) for start, stop in ((0, 1), (1, 2), (2, 3))]
    table = read_answer(writer.start({}) + b"".join(parts) + writer.end())
    assert table["set"].to_pylist() == SETS


def test_csv() -> None:
    """A field per word, or one of all where their number differs."""
    writer = CsvWriter()
    lines = writer.write({"top": COLUMN, "set": RAGGED}, None).decode().splitlines()
    assert lines == ["cell_id,top_0,top_1,set", "0,c,a,c|a", "1,bé,c,", "2,a,bé,bé"]


def test_h5ad(tmp_path: Path) -> None:
    """In obsm, or in obs where their number differs; anndata reads and writes them."""
    writer = ColumnsWriter()
    head = {"task": "t", "model": {"name": "m"}, "counts": {"n_cells": 3}}
    content = writer.start(head)
    for start, stop in ((0, 2), (2, 3)):
        content += writer.write(take({"top": COLUMN, "set": RAGGED}, start, stop), None)
    with h5py.File(tmp_path / "answer.h5ad", "w") as file:
        answer_file.write(io.BytesIO(content).read, file)
    adata = ad.read_h5ad(tmp_path / "answer.h5ad")
    assert adata.obsm["top"].tolist() == WORDS
    assert adata.obs["set"].tolist() == ["c|a", "", "bé"]
    adata.write_h5ad(tmp_path / "again.h5ad")
    assert ad.read_h5ad(tmp_path / "again.h5ad").obsm["top"].tolist() == WORDS


def test_only_words_that_occur() -> None:
    """Cells without a word, and words without a cell."""
    used = LabelLists(np.array([[3, -1], [-1, -1]], dtype=np.int32), ("a", "b", "c", "d"), is_ragged=True).used()
    assert (used.words, used.codes.tolist()) == (("d",), [[0, -1], [-1, -1]])
    assert used.lists() == [["d"], []]
    assert COLUMN.used().lists() == WORDS


def test_tensors() -> None:
    """BYTES of two axes, as JSON and as bytes."""
    assert describe(COLUMN) == ("BYTES", (3, 2))
    body, _ = write({}, [("top", COLUMN, False)])
    assert json.loads(body)["outputs"][0]["data"] == [word for row in WORDS for word in row]
    body, _ = write({}, [("set", RAGGED, False)])
    assert json.loads(body)["outputs"][0]["data"] == ["c", "a", "", "", "bé", ""]
    body, size = write({}, [("top", COLUMN, True)])
    assert body[size:] == b"".join(len(w.encode()).to_bytes(4, "little") + w.encode() for row in WORDS for w in row)


def test_parts() -> None:
    """Taken apart and put together it is what it was."""
    parts = [take({"top": COLUMN}, start, stop) for start, stop in ((0, 1), (1, 3))]
    whole = concatenate(parts)["top"]
    assert [n_cells(part) for part in parts] == [1, 2]
    assert whole.codes.tolist() == COLUMN.codes.tolist()
    assert whole.words == COLUMN.words
