"""reference/: the cells that a model was trained on, as tables beside the graphs."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.contract.manifest import Manifest

_SEPARATORS = re.compile(r"[\t\n]")
_FIXED = ("cell_id", "batch")
NO_LABEL = -1


@dataclass(frozen=True)
class ReferenceCells:
    """All members have one entry per cell, in the order of the files."""

    cell_ids: tuple[str, ...]
    """Unique."""

    batch: NDArray[np.int32]
    """Positions in `batch.names` of the manifest, shape (n_cells,)."""

    labels: Mapping[str, NDArray[np.int32]]
    """By label level the positions of the classes, NO_LABEL for a cell without one, shape (n_cells,)."""

    latent: NDArray[np.float32]
    """Shape (n_cells, n_latent)."""

    umap: NDArray[np.float32] | None = None
    """Shape (n_cells, 2)."""

    def __len__(self) -> int:
        return len(self.cell_ids)

    @classmethod
    def parse(cls, manifest: Manifest, contents: Mapping[str, bytes]) -> "ReferenceCells":
        """Read the files that `manifest.reference` names.

        Raises:
            ValueError: with the file and the line, where they are not as documented.
        """
        reference = manifest.reference
        assert reference is not None, "the caller looks"
        rows, levels = _rows(contents[reference.cells], reference.n_cells, reference.cells)
        classes = {level.name: {name: i for i, name in enumerate(level.classes)} for level in manifest.labels}
        batches = {name: i for i, name in enumerate(manifest.batch.names)}
        if unknown := [name for name in levels if name not in classes]:
            raise ValueError(f"{reference.cells} has a column '{unknown[0][:60]}', which is no label level")
        if reference.vote and (missing := sorted(set(reference.vote.answers) - set(levels))):
            raise ValueError(f"{reference.cells} has no column '{missing[0]}' to vote with")
        ids = tuple(row[0] for row in rows)
        if len(set(ids)) != len(ids):
            raise ValueError(f"{reference.cells} has a cell_id twice")
        return cls(
            cell_ids=ids,
            batch=_codes([row[1] for row in rows], batches, reference.cells),
            labels={
                name: _codes([row[2 + i] for row in rows], {"": NO_LABEL, **classes[name]}, reference.cells)
                for i, name in enumerate(levels)
            },
            latent=_array(contents[reference.latent], (reference.n_cells, manifest.n_latent), reference.latent),
            umap=_array(contents[reference.umap], (reference.n_cells, 2), reference.umap) if reference.umap else None,
        )


def dump_cells(cell_ids: tuple[str, ...], batch: tuple[str, ...], labels: Mapping[str, tuple[str, ...]]) -> bytes:
    """The bytes of the table of reference cells; "" for a cell without a label.

    Raises:
        ValueError: a name holds a tab or a line break.
    """
    header = (*_FIXED, *labels)
    rows = list(zip(cell_ids, batch, *labels.values(), strict=True))
    for name in (*header, *(name for row in rows for name in row)):
        if _SEPARATORS.search(name):
            raise ValueError(f"the name {name[:40]!r} holds a character that separates names in the table")
    return ("\n".join("\t".join(row) for row in (header, *rows)) + "\n").encode()


def _rows(content: bytes, n_cells: int, file: str) -> tuple[list[list[str]], tuple[str, ...]]:
    lines = content.decode("utf-8").removesuffix("\n").split("\n")
    header = tuple(lines[0].split("\t"))
    if header[:2] != _FIXED or len(set(header)) != len(header):
        raise ValueError(f"{file}: line 1 must be the header {' '.join(_FIXED)} and the label levels, each once")
    if len(lines) - 1 != n_cells:
        raise ValueError(f"{file} has {len(lines) - 1} cells, not {n_cells}")
    rows = [line.split("\t") for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header) or not row[0]:
            raise ValueError(
                f"{file}: line {number} must have {len(header)} tab-separated columns, the first not empty"
            )
    return rows, header[2:]


def _codes(names: list[str], known: Mapping[str, int], file: str) -> NDArray[np.int32]:
    try:
        return np.array([known[name] for name in names], dtype=np.int32)
    except KeyError as error:
        raise ValueError(f"{file}: '{str(error.args[0])[:60]}' is no batch or class of the manifest") from None


def _array(content: bytes, shape: tuple[int, int], file: str) -> NDArray[np.float32]:
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is no npy file: {str(error)[:100]}") from None
    if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != shape:
        raise ValueError(f"{file} is not float32 of shape {shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{file} holds a number that is not finite")
    array: NDArray[np.float32] = np.ascontiguousarray(found)
    return array
