"""An answer as an .h5ad file: what was asked for in obs, obsm and uns, as AnnData 0.8 and later write it.

Made of the messages that formats/h5ad.py writes. Used in the parse process only.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from service.cells.hdf5 import messages

_TEXT = h5py.string_dtype()


def write(read: Callable[[int], bytes], file: h5py.File) -> None:
    """Write an answer.

    Args:
        read: gives the messages of the answer: its head first, then one for some cells each.
        file: empty and open for writing.
    """
    head = _next(read)[0]["head"]
    n_cells: int = head["counts"]["n_cells"]
    _describe(file, "anndata", "0.1.0")
    obs, var = _dataframe(file, "obs", n_cells), _dataframe(file, "var", 0)
    var.attrs["column-order"] = np.array([], dtype=_TEXT)
    obsm = _mapping(file, "obsm")
    for name in ("layers", "obsp", "varm", "varp"):
        _mapping(file, name)
    uns = _mapping(file, "uns")
    _string(_mapping(uns, "cellserve"), head["task"], json.dumps(head))
    names = _mapping(uns, "cellserve_names")
    columns: dict[str, h5py.Dataset] = {}
    position = 0
    for chunk, arrays in _rest(read):
        parts = iter(arrays)
        stop = position + chunk["n_cells"]
        if chunk["has_cell_ids"]:
            lengths, text = next(parts), next(parts).tobytes()
            ends = np.cumsum(lengths)
            obs["_index"][position:stop] = [
                text[end - size : end].decode() for end, size in zip(ends, lengths, strict=True)
            ]
        else:
            obs["_index"][position:stop] = [str(number) for number in range(position, stop)]
        for column in chunk["columns"]:
            values = next(parts)
            if column["name"] not in columns:
                columns[column["name"]] = _create(column, n_cells, obs, obsm, names, head["model"]["name"])
            if column["kind"] in ("vectors", "lists"):
                values = values.reshape(chunk["n_cells"], column["width"])
            if column["kind"] == "flags":
                values = values.astype(bool)
            if column["kind"] == "lists":
                values = _words(values, column)
            columns[column["name"]][position:stop] = values
        position = stop
    obs.attrs["column-order"] = np.array([name for name in obs if name != "_index"], dtype=_TEXT)


def _create(
    column: dict[str, Any], n_cells: int, obs: h5py.Group, obsm: h5py.Group, names: h5py.Group, model: str
) -> h5py.Dataset:
    """The empty data set for a column."""
    name, kind = column["name"], column["kind"]
    if kind == "vectors":
        # The same places as service.client fills.
        key = f"X_{model}" if name == "latent" else name
        if column["names"] is not None:
            _array(names, key, np.array(column["names"], dtype=_TEXT), "string-array")
        return _described(obsm.create_dataset(key, (n_cells, column["width"]), "f4"), "array")
    if kind == "lists":
        if column["is_ragged"]:
            return _described(obs.create_dataset(name, (n_cells,), _TEXT), "string-array")
        return _described(obsm.create_dataset(name, (n_cells, column["width"]), _TEXT), "string-array")
    if kind == "labels":
        group = obs.create_group(name)
        _describe(group, "categorical", "0.2.0")
        group.attrs["ordered"] = False
        _array(group, "categories", np.array(column["words"], dtype=_TEXT), "string-array")
        return _described(group.create_dataset("codes", (n_cells,), "i4"), "array")
    return _described(obs.create_dataset(name, (n_cells,), bool if kind == "flags" else "f4"), "array")


def _words(codes: NDArray[np.int32], column: dict[str, Any]) -> NDArray[np.object_]:
    """The words of each cell (n_cells, width), or all of them as one (n_cells,) where their number differs from cell to cell."""
    words = column["words"]
    if column["is_ragged"]:
        return np.array(["|".join([words[code] for code in row if code >= 0]) for row in codes], dtype=object)
    return np.array(words, dtype=object)[codes]


def _next(read: Callable[[int], bytes]) -> messages.Message:
    message = messages.unpack(read)
    if message is None:
        raise messages.BrokenMessage("there is none")
    return message


def _rest(read: Callable[[int], bytes]) -> Iterator[tuple[dict[str, Any], list[NDArray[Any]]]]:
    while (message := messages.unpack(read)) is not None:
        yield message


def _dataframe(file: h5py.File, name: str, n_rows: int) -> h5py.Group:
    group = file.create_group(name, track_order=True)
    _describe(group, "dataframe", "0.2.0")
    group.attrs["_index"] = "_index"
    _described(group.create_dataset("_index", (n_rows,), _TEXT), "string-array")
    return group


def _mapping(parent: h5py.Group, name: str) -> h5py.Group:
    group = parent.create_group(name)
    _describe(group, "dict", "0.1.0")
    return group


def _string(parent: h5py.Group, name: str, text: str) -> None:
    _described(parent.create_dataset(name, data=text, dtype=_TEXT), "string")


def _array(parent: h5py.Group, name: str, values: NDArray[Any], kind: str) -> None:
    _described(parent.create_dataset(name, data=values), kind)


def _described(dataset: h5py.Dataset, kind: str) -> h5py.Dataset:
    _describe(dataset, kind, "0.2.0")
    return dataset


def _describe(node: h5py.Group | h5py.Dataset, kind: str, version: str) -> None:
    node.attrs["encoding-type"], node.attrs["encoding-version"] = kind, version
