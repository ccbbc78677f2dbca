"""Reads what torch.save wrote without running it: an allow-list of names, each with a stand-in of ours, and an error for every other.

A pickle is a program that may call whatever it can name. Here it can name only the functions below, which build plain Python values,
numpy arrays and torch tensors; nothing of numpy's, pandas' or torch's own unpickling code is reached.
"""

import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAX_BYTES = 4 << 30
"""Of all members together, unpacked; a zip of a few bytes can claim any size."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}
_DTYPE_KINDS = "biufUSO"


class UnsafePickle(Exception):
    """A pickle names something that reading data does not need, or is not built as torch builds it."""


class Ignored:
    """Stands for objects whose contents do not matter here, such as pandas tables of the training history."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *_: object) -> None:
        self.order, self.code = "<", code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "|"

    def numpy(self) -> np.dtype:
        found = np.dtype(self.order + self.code if self.order != "|" else self.code)
        if found.kind not in _DTYPE_KINDS or found.fields is not None:
            raise UnsafePickle(f"an array of type {found}")
        return found


class _Array:
    """Stands for numpy.ndarray while it is rebuilt; `unwrap` makes the array."""

    values: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        kind = dtype.numpy()
        if kind.kind == "O":
            flat = np.empty(len(data), dtype=object)
            flat[:] = [unwrap(value) for value in data]
        else:
            flat = np.frombuffer(data, dtype=kind)
        self.values = flat.reshape(shape, order="F" if is_fortran else "C")


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype=dtype.numpy())[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UnsafePickle(f"_codecs.encode with '{encoding}'")
    return text.encode("latin1")


def _bytes(*arguments: object) -> bytes:
    if arguments:
        raise UnsafePickle("bytes with arguments")
    return b""


def _tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> torch.Tensor:
    # as_strided refuses what lies outside of the storage.
    return torch.as_strided(storage, size, stride, offset).clone()


def _parameter(data: torch.Tensor, *_: object) -> torch.Tensor:
    return data


_BUILTINS = {"dict": dict, "list": list, "set": set, "tuple": tuple, "slice": slice, "bytes": _bytes}
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{(module, name): kind for module in ("builtins", "__builtin__") for name, kind in _BUILTINS.items()},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    """Builds values from names of the allow-list only."""

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], torch.Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module.split(".")[0] == "pandas":
            return Ignored
        raise UnsafePickle(f"the name {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Numbers that lie beside the pickle in the zip."""
        kind, dtype, key, _, n_values = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise UnsafePickle(f"a reference to {kind!r}")
        return self._storage(str(key), dtype, int(n_values))


def read_torch_file(path: Path) -> Any:
    """The values of a file of torch.save: dicts, lists, text, numbers, numpy arrays and torch tensors.

    Raises:
        UnsafePickle: with the path, for a name that is not on the list, and for a file that is not built as torch builds it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except UnsafePickle as error:
        raise UnsafePickle(
            f"{path} was not read: it holds {error}, which data do not need and which could run as a program. Nothing of it was run."
        ) from None
    except Exception as error:  # whatever a spoiled pickle makes the stand-ins stumble over
        raise UnsafePickle(f"{path} is not a file of torch.save: {type(error).__name__}: {error}") from error


def _read(archive: zipfile.ZipFile) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    if sum(info.file_size for info in members.values()) > MAX_BYTES:
        raise UnsafePickle(f"more than {MAX_BYTES:,} bytes")
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UnsafePickle(f"{len(roots)} pickles instead of one")
    order = archive.read(f"{roots[0]}/byteorder").strip() if f"{roots[0]}/byteorder" in members else b"little"
    if order != b"little":
        raise UnsafePickle(f"numbers in the byte order {order!r}")

    def storage(key: str, dtype: torch.dtype, n_values: int) -> torch.Tensor:
        content = bytearray(archive.read(f"{roots[0]}/data/{key}"))
        if len(content) < n_values * dtype.itemsize:
            raise UnsafePickle(f"{len(content):,} bytes for {n_values:,} values")
        return torch.frombuffer(content, dtype=dtype, count=n_values) if n_values else torch.zeros(0, dtype=dtype)

    with archive.open(members[f"{roots[0]}/data.pkl"]) as file:
        return unwrap(_Reader(file, storage).load())


def unwrap(value: Any) -> Any:
    """The same value with arrays in the place of their stand-ins."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        return {unwrap(key): unwrap(member) for key, member in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(unwrap(member) for member in value)
    return value
