"""Exact neighbours: those that float64 finds, ties by position, and the same bits for a cell alone or among others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.reference_cells import ReferenceCells
from service.inference import nearest
from service.inference.nearest import Nearest


def among(latent: np.ndarray) -> Nearest:
    n_cells = len(latent)
    return Nearest(ReferenceCells(tuple(map(str, range(n_cells))), np.zeros(n_cells, np.int32), {}, latent))


def expected(reference: np.ndarray, latent: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By sorting all distances in float64; lexsort puts equal ones by position."""
    difference = reference.astype(np.float64)[None] - latent.astype(np.float64)[:, None]
    squares = np.zeros(difference.shape[:2])
    for unit in range(reference.shape[1]):
        squares += difference[:, :, unit] ** 2
    order = np.argsort(squares, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(squares, order, axis=1))


def cells(n_cells: int, n_latent: int, seed: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n_cells, n_latent)) * scale + offset).astype(np.float32)


@pytest.mark.parametrize("n_reference", [20, 4_096, 4_097, 9_000])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 100.0), (1e3, -1e6)])
def test_the_nearest_are_found(n_reference: int, scale: float, offset: float) -> None:
    """Of few and of many cells, also where they lie so far from zero that float32 products round everything away."""
    reference, latent = cells(n_reference, 8, 0, scale, offset), cells(70, 8, 1, scale, offset)
    positions, distances = among(reference).search(latent, 15)
    wanted = expected(reference, latent, 15)

    assert positions.dtype == np.int32
    assert positions.tolist() == wanted[0].tolist()
    assert distances.tobytes() == wanted[1].tobytes()


@settings(max_examples=40, deadline=None)
@given(
    data=st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=40),
    query=st.lists(st.integers(-2, 2), min_size=3, max_size=3),
    share=st.floats(0.01, 1),
)
def test_ties(data: list[list[int]], query: list[int], share: float) -> None:
    """Cells on a grid, where most distances occur many times: of equally near ones the first come first."""
    reference, latent = np.array(data, np.float32), np.array([query], np.float32)
    k = max(1, int(share * len(data)))
    assert among(reference).search(latent, k)[0].tolist() == expected(reference, latent, k)[0].tolist()


@pytest.mark.parametrize("n_reference", [500, 6_000])
def test_alone_or_among_others(n_reference: int) -> None:
    """Every cell has the bits alone, first, last and in the middle that it has among 300."""
    found = among(cells(n_reference, 32, 0))
    latent = cells(300, 32, 1)
    together = found.search(latent, 10)
    for row in (0, 1, 63, 64, 65, 299):
        alone = found.search(latent[row : row + 1], 10)
        moved = found.search(np.roll(latent, 17, axis=0), 10)
        for whole, one, other in zip(together, alone, moved, strict=True):
            assert whole[row].tobytes() == one[0].tobytes() == other[(row + 17) % 300].tobytes()


def test_copies_of_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all cells are equally near, all are candidates: they are measured in parts, and the first ones given."""
    monkeypatch.setattr(nearest, "_MAX_PAIRS", 10_000)
    positions, distances = among(np.ones((5_000, 4), np.float32)).search(np.zeros((5, 4), np.float32), 3)
    assert positions.tolist() == [[0, 1, 2]] * 5
    assert (distances == 2).all()


def test_all_cells_and_a_cell_itself() -> None:
    """K may be the whole reference; a reference cell is its own nearest, at distance 0."""
    reference = cells(30, 5, 0)
    positions, distances = among(reference).search(reference, 30)
    assert np.sort(positions, axis=1).tolist() == [list(range(30))] * 30
    assert positions[:, 0].tolist() == list(range(30))
    assert (distances[:, 0] == 0).all()
