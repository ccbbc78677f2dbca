"""R's .RData files as Python objects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rdata
import scipy.sparse as sp


@dataclass(frozen=True)
class Matrix:
    """A dgCMatrix of R's Matrix package."""

    values: sp.csc_matrix
    row_names: list[str]
    column_names: list[str]


def _matrix(_: Any, attributes: dict[str, Any]) -> Matrix:
    shape = tuple(int(size) for size in attributes["Dim"])
    values = sp.csc_matrix((attributes["x"], attributes["i"], attributes["p"]), shape=shape)
    rows, columns = attributes["Dimnames"]
    return Matrix(values, [str(name) for name in rows], [str(name) for name in columns])


def _plain(obj: Any, _: dict[str, Any]) -> Any:
    """Objects of which only the contents matter."""
    return obj


# Classes that occur in our files. One that is not listed makes rdata warn, and our tests turn the warning into an error.
_PLAIN = ("collector", "collector_character", "collector_guess", "col_spec", "multinom_topic_model_fit", "list")
_CONSTRUCTORS = {
    **rdata.conversion.DEFAULT_CLASS_MAP,
    "dgCMatrix": _matrix,
    **dict.fromkeys(_PLAIN, _plain),
}


def read_rdata(path: Path) -> dict[str, Any]:
    """The objects of an .RData or .rda file, by name; sparse matrices as `Matrix`, data frames as pandas."""
    return rdata.read_rda(path, constructor_dict=_CONSTRUCTORS)
