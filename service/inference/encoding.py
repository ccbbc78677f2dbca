"""Graphs that take counts, run on sparse matrices of them."""

import threading
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.genes import densify, library_size, scatter
from service.inference.session import N_SMALL, Array, Session, padded


def encode(sessions: Mapping[str, Session], counts: sp.csr_matrix) -> NDArray[np.float32]:
    """Latent, float32 (n_cells, n_latent), of raw counts aligned to the model's genes, (n_cells, n_genes); at least one cell.

    Args:
        sessions: of the model's graphs; in two steps where it has `transform` and `encode_values`, else by `encode`.
        counts: each row's latent has the same bits whatever the other rows are.
    """
    if "encode_values" not in sessions:
        return run_counts(sessions["encode"], counts)["latent"]
    transform = sessions["transform"]
    library = library_size(counts) if len(transform.inputs) > 1 else None

    def dense(rows: slice, n_rows: int) -> dict[str, Array]:
        ends = counts.indptr[rows.start : rows.stop + 1]
        entries = counts.data[ends[0] : ends[-1]]
        if library is not None:
            values = transform.run_flat({"count": entries, "library": np.repeat(library[rows], np.diff(ends))})
        elif entries.max(initial=0) < N_SMALL:  # a few times faster than the logarithm
            values = transform.of_small_counts.take(entries.astype(np.intp), mode="wrap")
        else:
            values = transform.run_flat({"count": entries})
        return {"values": scatter(values, counts, rows, _buffers.take(n_rows, counts.shape[1]))}

    return sessions["encode_values"].run_rows(counts.shape[0], dense)["latent"]


def run_counts(
    session: Session, counts: sp.csr_matrix, more: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
) -> dict[str, NDArray[np.float32]]:
    """Outputs of a graph that takes counts, and perhaps `more` inputs with one row per cell."""

    def dense(rows: slice, n_rows: int) -> dict[str, Array]:
        # Densified at the padded size into this thread's buffer, so that there is nothing left to copy or to allocate.
        known: dict[str, Array] = {"counts": densify(counts, rows, _buffers.take(n_rows, counts.shape[1]))}
        return known | {name: padded(array[rows], n_rows) for name, array in more.items()}

    return session.run_rows(counts.shape[0], dense)


class _Buffers(threading.local):
    """One matrix per thread that runs graphs."""

    def __init__(self) -> None:
        self._held = np.empty((0, 0), dtype=np.float32)

    def take(self, n_rows: int, n_genes: int) -> NDArray[np.float32]:
        """A matrix of that shape with anything in it; it belongs to this thread until the next call."""
        if self._held.shape != (n_rows, n_genes):
            self._held = np.empty((n_rows, n_genes), dtype=np.float32)
        return self._held


_buffers = _Buffers()
