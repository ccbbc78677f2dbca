"""Answers as columns: cut into pieces and joined again they are what they were."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cells.columns import Column, Columns, LabelLists, Labels, Values, Vectors, concatenate, n_cells, take


def columns(size: int) -> Columns:
    """One column of each kind for `size` cells."""
    random = np.random.default_rng(size)
    return {
        "score": Values(random.random(size).astype(np.float32)),
        "is_empty": Values(random.random(size) < 0.5),
        "latent": Vectors(random.standard_normal((size, 3)).astype(np.float32)),
        "probabilities": Vectors(random.random((size, 2)).astype(np.float32), ("no", "yes")),
        "label": Labels(random.integers(0, 2, size, dtype=np.int32), ("no", "yes")),
        "neighbours": LabelLists(random.integers(0, 2, (size, 4), dtype=np.int32), ("no", "yes")),
        "set": LabelLists(random.integers(-1, 2, (size, 2), dtype=np.int32), ("no", "yes"), is_ragged=True),
    }


def array(column: Column) -> np.ndarray:
    return column.codes if isinstance(column, Labels | LabelLists) else column.values


def assert_same(found: Columns, expected: Columns) -> None:
    """Same names in the same order, same kinds, words and types, and every bit."""
    assert list(found) == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert type(one) is type(other)
        assert getattr(one, "words", None) == getattr(other, "words", None)
        assert getattr(one, "names", None) == getattr(other, "names", None)
        assert array(one).dtype == array(other).dtype
        assert array(one).shape == array(other).shape
        assert array(one).tobytes() == array(other).tobytes()


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 30), cuts=st.lists(st.integers(0, 30), max_size=5))
def test_pieces_join_to_the_whole(size: int, cuts: list[int]) -> None:
    """However the cells are cut, the pieces in their order are the whole, bit for bit; empty pieces are harmless."""
    whole = columns(size)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    pieces = [take(whole, start, stop) for start, stop in itertools.pairwise(edges)]

    assert [n_cells(piece) for piece in pieces] == np.diff(edges).tolist()
    assert_same(concatenate(pieces), whole)


def test_one_piece_is_not_copied() -> None:
    """A single piece is given back as it is."""
    whole = columns(4)
    assert concatenate([whole]) is whole


@pytest.mark.parametrize("name", list(columns(1)))
def test_number_of_cells(name: str) -> None:
    """Whichever column comes first says how many cells there are."""
    assert n_cells({name: columns(7)[name]}) == 7
