"""text/csv: what is written can be read by others, and is not run by a spreadsheet."""

import csv
import io

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from service.cells.columns import Labels, Values, Vectors
from service.cells.formats.csv import CsvWriter


def written(words: list[str], cell_ids: list[str] | None = None) -> bytes:
    """A table of one cell per word."""
    columns = {
        "predicted_labels": Labels(np.arange(len(words), dtype=np.int32), tuple(words)),
        "conf_score": Values(np.linspace(-1, 1, len(words), dtype=np.float32)),
        "latent": Vectors(np.arange(2 * len(words), dtype=np.float32).reshape(-1, 2) / 3),
        "probabilities": Vectors(np.zeros((len(words), 2), np.float32), ("B, naive", 'a "T" cell')),
        "is_empty": Values(np.zeros(len(words), np.bool_)),
    }
    writer = CsvWriter()
    return writer.start({}) + writer.write(columns, cell_ids) + writer.end()


def test_pandas_reads_it() -> None:
    """Names, quotes, commas, numbers and truth values arrive as they were, float32 to the bit."""
    table = pd.read_csv(io.BytesIO(written(["B, naive", 'a "T" cell', "two\nlines"], ["x", "y,z", "w"])))

    assert list(table.columns) == [
        "cell_id", "predicted_labels", "conf_score", "latent_0", "latent_1", "probabilities_B, naive", 'probabilities_a "T" cell', "is_empty",
    ]  # fmt: skip
    assert list(table["cell_id"]) == ["x", "y,z", "w"]
    assert list(table["predicted_labels"]) == ["B, naive", 'a "T" cell', "two\nlines"]
    assert table["latent_1"].astype(np.float32).to_numpy().tobytes() == (np.array([1, 3, 5], np.float32) / 3).tobytes()
    assert list(table["is_empty"]) == [False, False, False]


def test_cells_without_names_are_numbered() -> None:
    """Cells without a name are numbered through, over all pieces."""
    writer = CsvWriter()
    one = {"conf_score": Values(np.array([0.5, np.nan], np.float32))}

    assert writer.write(one, None) + writer.write(one, None) == b"cell_id,conf_score\r\n0,0.5\r\n1,\r\n2,0.5\r\n3,\r\n"


def test_no_formula_is_run() -> None:
    """Words that a spreadsheet would run stand after an apostrophe; negative numbers are numbers."""
    lines = list(csv.reader(io.StringIO(written(["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "a=b"]).decode(), newline="")))

    assert [line[1] for line in lines[1:]] == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\tx", "a=b"]
    assert lines[1][2] == "-1.0"


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_any_word(words: list[str]) -> None:
    """Whatever a word holds, it is one field of one line, and read back it ends with the word."""
    lines = list(
        csv.reader(io.StringIO(written(words, words).decode("utf-8", "surrogatepass"), newline=""), strict=True)
    )

    assert len(lines) == len(words) + 1
    for word, line in zip(words, lines[1:], strict=True):
        assert len(line) == len(lines[0])
        assert line[1].removeprefix("'") == word.removeprefix("'")
