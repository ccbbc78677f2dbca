"""A key of 256 bits per cell: equal for equal counts, whatever the order, the zeros and the repeated genes that a format leaves behind.

A cell's key is the sum of its counts times four random words per gene, modulo 2**64 (a multilinear hash; Carter and Wegman 1979). The words are
drawn when the process starts and never leave it, so nobody can make two cells that collide; for counts below 2**25 two different cells have
the same key with a probability of at most 2**-156. A cryptographic hash of the same cell needs its genes sorted first, which takes longer than
many a model's answer.
"""

import hashlib
import secrets
from typing import cast

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.counts import csr

N_WORDS = 4
BLOCK_ROWS = 256
"""Cells whose counts are held as 64-bit integers at a time."""


class Words:
    """The random words of a process. Belongs to one event loop; what it gives may be used anywhere."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._of_genes = np.empty((0, N_WORDS), dtype=np.uint64)

    def of_genes(self, n_genes: int) -> NDArray[np.uint64]:
        """Words of the genes of a model by their position, shape (n_genes, 4)."""
        n_more = n_genes - len(self._of_genes)
        if n_more > 0:
            drawn = np.frombuffer(secrets.token_bytes(8 * N_WORDS * n_more), dtype=np.uint64)
            self._of_genes = np.concatenate([self._of_genes, drawn.reshape(n_more, N_WORDS)])
        return self._of_genes[:n_genes]

    def of_text(self, text: str) -> NDArray[np.uint64]:
        """Words of a text, shape (4,): added to a cell's they tell what was asked about it."""
        digest = hashlib.blake2b(text.encode(), digest_size=8 * N_WORDS, key=self._secret).digest()
        return np.frombuffer(digest, dtype=np.uint64)


def fingerprints(
    counts: sp.csr_matrix, of_genes: NDArray[np.uint64], of_question: NDArray[np.uint64], model_number: int
) -> list[bytes]:
    """One key per cell, 40 bytes: the model's number, and 256 bits of cell and question.

    Args:
        counts: whole numbers of shape (n_cells, n_genes), in any order within a cell; what occurs twice counts as its sum.
        of_genes: random words, shape (n_genes, 4).
        of_question: words of what is asked, shape (4,).
        model_number: of the loaded model.
    """
    n_cells = counts.shape[0]
    keys = np.empty((n_cells, 1 + N_WORDS), dtype=np.uint64)
    keys[:, 0] = model_number
    for start in range(0, n_cells, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n_cells)
        first, last = counts.indptr[start], counts.indptr[stop]
        whole = csr(
            counts.data[first:last].astype(np.uint64),
            counts.indices[first:last],
            counts.indptr[start : stop + 1] - first,
            counts.shape[1],
        )
        keys[start:stop, 1:] = whole @ of_genes + of_question
    return cast("list[bytes]", keys.view(np.dtype(("V", keys.itemsize * keys.shape[1]))).ravel().tolist())


def model_prefix(model_number: int) -> bytes:
    """What the keys of a model begin with."""
    return np.uint64(model_number).tobytes()
