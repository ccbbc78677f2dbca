"""Cells of tensors: dense counts, or the three arrays of compressed sparse rows; with the names of the genes, or in the model's order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from service.cells.counts import Cells, csr
from service.cells.formats.format import MAX_GENES, check_names, remembered
from service.cells.formats.tensors import Tensor
from service.errors import InvalidCells, NoCells, TooManyCells


@dataclass(frozen=True)
class Input:
    """A tensor that may be sent."""

    datatype: str
    n_axes: int
    description: str


INPUTS: dict[str, Input] = {
    "counts": Input("FP32", 2, "Raw counts, one row per cell and one column per gene."),
    "genes": Input(
        "BYTES",
        1,
        "Names of the columns, ids or symbols in any order; without it they are the model's genes in its order.",
    ),
    "data": Input("FP32", 1, "In place of `counts`: the counts that are not zero, cell after cell."),
    "indices": Input("INT64", 1, "With `data`: the column of each count."),
    "indptr": Input(
        "INT64", 1, "With `data`: where each cell starts in it, and the end of the last; one more than there are cells."
    ),
}
SPARSE = ("data", "indices", "indptr")


def cells(tensors: Mapping[str, Tensor], model: str, genes: tuple[str, ...], max_cells: int) -> Cells:
    """The cells of a request.

    Args:
        tensors: by name.
        model: its name, for messages.
        genes: of the model in its order, which the columns mean where the client does not name them.
        max_cells: more are refused.

    Raises:
        InvalidCells: an input is unknown or missing, or has another type or shape than `INPUTS` and the other inputs say.
        TooManyCells, NoCells.
    """
    for name, tensor in tensors.items():
        if name not in INPUTS:
            raise InvalidCells(
                problem=f"unexpected inference input '{name[:60]}' for model '{model}'. The inputs are: {', '.join(INPUTS)}."
            )
        wanted = INPUTS[name]
        if tensor.datatype != wanted.datatype:
            raise InvalidCells(
                problem=f"inference input '{name}' data-type is '{tensor.datatype}', but model '{model}' expects '{wanted.datatype}'."
            )
        if len(tensor.shape) != wanted.n_axes:
            raise _unexpected_shape(tensor, model, [-1] * wanted.n_axes)
    if "genes" in tensors:
        genes = _gene_names(tensors["genes"])
    if ("counts" in tensors) == any(name in tensors for name in SPARSE) or (
        "counts" not in tensors and not set(SPARSE) <= set(tensors)
    ):
        raise InvalidCells(
            problem=f"expected the input 'counts' for model '{model}', or in its place all of {', '.join(SPARSE)}; got "
            f"{', '.join(tensors)}."
        )
    n_cells = tensors["counts"].shape[0] if "counts" in tensors else tensors["indptr"].shape[0] - 1
    if n_cells > max_cells:
        raise TooManyCells(n_cells=n_cells, limit_cells=max_cells)
    if n_cells < 1:
        raise NoCells
    if "counts" not in tensors:
        data, indices, indptr = (tensors[name].numbers() for name in SPARSE)
        return Cells(genes, _csr(data, indices, indptr, len(genes)))
    counts = tensors["counts"]
    if counts.shape[1] != len(genes):
        raise _unexpected_shape(counts, model, [-1, len(genes)])
    return Cells(genes, _sparse(counts.numbers()))


def _unexpected_shape(tensor: Tensor, model: str, expected: list[int]) -> InvalidCells:
    return InvalidCells(
        problem=f"unexpected shape for input '{tensor.name}' for model '{model}'. Expected {expected}, got {list(tensor.shape)}."
    )


def _gene_names(tensor: Tensor) -> tuple[str, ...]:
    if tensor.shape[0] > MAX_GENES:
        raise InvalidCells(problem=f"'genes' has {tensor.shape[0]:,} names; no genome has more than {MAX_GENES:,}.")
    if isinstance(tensor.content, memoryview):
        return _decoded_names(bytes(tensor.content), tensor.shape)
    return check_names(tensor.words(), "genes")


@remembered
def _decoded_names(content: bytes, shape: tuple[int, ...]) -> tuple[str, ...]:
    return check_names(Tensor("genes", "BYTES", shape, memoryview(content)).words(), "genes")


def _sparse(dense: NDArray[Any]) -> sp.csr_matrix:
    """Counts that are not zero; NaN is not zero, so what is no count is still there to be found."""
    n_cells, n_genes = dense.shape
    at = np.flatnonzero(dense != 0)  # several times as fast as to look for the numbers themselves
    starts = np.arange(n_cells + 1) * n_genes
    indptr = np.searchsorted(at, starts)
    return csr(dense.reshape(-1)[at], at - np.repeat(starts[:-1], np.diff(indptr)), indptr, n_genes)


def _csr(data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[Any], n_genes: int) -> sp.csr_matrix:
    if len(data) != len(indices):
        raise InvalidCells(problem=f"'data' has {len(data):,} counts, but 'indices' {len(indices):,} columns.")
    if indptr[0] != 0 or indptr[-1] != len(data) or (indptr[1:] < indptr[:-1]).any():
        raise InvalidCells(problem=f"'indptr' must rise from 0 to the {len(data):,} counts of 'data' and never fall.")
    if len(indices) and (indices.min() < 0 or indices.max() >= n_genes):
        first = int(np.argmax((indices < 0) | (indices >= n_genes)))
        raise InvalidCells(problem=f"'indices'[{first}] is {indices[first]}, but there are {n_genes:,} genes.")
    return csr(data, indices, indptr, n_genes)
