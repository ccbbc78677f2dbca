"""application/x-hdf5: AnnData's files. Whole files on disk, which another process reads and writes (service/cells/hdf5)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.cells.columns import Column, Columns, LabelLists, Labels, Vectors, n_cells, take
from service.cells.columns import arrays as arrays_of
from service.cells.formats.format import Format
from service.cells.hdf5 import messages


class Places(BaseModel):
    """Where in a file the counts and the names of their genes are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Of an .h5ad body: the layer that holds the raw counts, or `X`. By default the first of layers/counts, raw/X and X that "
        "does; the head of the answer says which (`counts.source`).",
    )
    use_raw: bool = Field(False, description="Of an .h5ad body: whether the raw counts are in raw/X.")
    gene_key: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Of an .h5ad body: the column of var with the names of the genes; var_names by default.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> "Places":
        if self.use_raw and self.layer is not None:
            raise ValueError("give either layer or use_raw")
        return self


class ColumnsWriter:
    """Writes what an .h5ad file is made of, as messages; the file itself has no order in which it could be sent piece by piece."""

    def start(self, head: dict[str, Any]) -> bytes:
        """The head."""
        return messages.pack({"head": head})

    def write(self, columns: Columns, cell_ids: Sequence[str] | None) -> bytes:
        """Some cells; as many messages as it takes to keep each within its bound."""
        width = sum(4 * int(np.prod(array.shape[1:])) for array in arrays_of(columns).values())
        n_at_once = max(1, messages.MAX_ARRAY_BYTES // 2 // max(1, width + 4096))
        pieces = []
        for start in range(0, n_cells(columns), n_at_once):
            stop = min(start + n_at_once, n_cells(columns))
            arrays: list[NDArray[Any]] = []
            described = []
            if cell_ids is not None:
                encoded = [cell_id.encode() for cell_id in cell_ids[start:stop]]
                arrays += [
                    np.array([len(cell_id) for cell_id in encoded], dtype=np.int64),
                    np.frombuffer(b"".join(encoded), np.uint8),
                ]
            part = {
                name: column.used() if isinstance(column, LabelLists) else column
                for name, column in take(columns, start, stop).items()
            }
            for (name, column), values in zip(part.items(), arrays_of(part).values(), strict=True):
                described.append({"name": name, **_described(column)})
                arrays.append(values.reshape(-1).astype("u1" if values.dtype == bool else values.dtype, copy=False))
            head = {"n_cells": stop - start, "has_cell_ids": cell_ids is not None, "columns": described}
            pieces.append(messages.pack(head, arrays))
        return b"".join(pieces)

    def end(self) -> bytes:
        """Nothing: the head says how many cells there are."""
        return b""


def _described(column: Column) -> dict[str, Any]:
    if isinstance(column, Labels):
        return {"kind": "labels", "words": column.words}
    if isinstance(column, LabelLists):
        width = column.codes.shape[1]
        return {"kind": "lists", "width": width, "words": column.words, "is_ragged": column.is_ragged}
    if isinstance(column, Vectors):
        return {"kind": "vectors", "width": column.values.shape[1], "names": column.names}
    return {"kind": "flags" if column.values.dtype == bool else "values"}


FORMAT = Format(
    media_type="application/x-hdf5",
    writer=ColumnsWriter,
    is_file=True,
    options=Places,
    description="An .h5ad file of any version of AnnData: counts in X, raw/X or a layer (options `layer`, `use_raw`), csr, csc or dense; "
    "names of genes in var_names or a column of var (option `gene_key`); obs_names are the cell ids. The answer is an .h5ad file without X: "
    "vectors and lists of words in obsm (`latent` as `X_<model>`), everything else in obs (with `|` between the words of lists that are not "
    "all equally long), the head as JSON in uns['cellserve'][task].",
    schema={"type": "string", "format": "binary"},
)
