"""Reading an .h5ad file as the server does: in a process of its own, and put together again."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp

from service.cells.file_processes import FileProcesses, Limits

LIMITS = Limits(seconds=20, memory_bytes=2**30, file_bytes=2**28)
JOB = {"max_cells": 1000, "max_decoded_bytes": 2**26, "layer": None, "use_raw": False, "gene_key": None}


def read(
    processes: FileProcesses, path: Path, limits: Limits = LIMITS, **job: Any
) -> tuple[dict[str, Any], sp.csr_matrix]:
    """What the file says, and its counts; `job` replaces what is asked for."""
    with processes.lease() as process, path.open("rb") as source, tempfile.TemporaryFile() as scratch:
        received = process.run({"job": "read", **JOB, **job}, source, scratch, limits)
        head, _ = next(received)
        blocks = [
            sp.csr_matrix((values, indices, indptr), (len(indptr) - 1, len(head["genes"])))
            for _, (indptr, indices, values) in received
        ]
    return head, sp.vstack(blocks, format="csr")


@contextmanager
def changed(path: Path) -> Iterator[h5py.File]:
    """The file, open to be changed."""
    with h5py.File(path, "r+") as file:
        yield file


def replace(group: h5py.Group, name: str, value: Any, **options: Any) -> h5py.Dataset:
    """Put another data set in a place, with the attributes of the one before."""
    attributes = dict(group[name].attrs)
    del group[name]
    dataset = group.create_dataset(name, data=value, **options)
    dataset.attrs.update(attributes)
    return dataset


def same(found: sp.csr_matrix, expected: sp.csr_matrix) -> bool:
    """Whether two matrices hold the same numbers."""
    return found.shape == expected.shape and np.array_equal(found.toarray(), expected.toarray())
