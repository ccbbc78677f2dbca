"""An HDF5 file of which only what lies in the file itself, and within limits, can be reached. Used in the parse process only."""

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5t
from numpy.typing import NDArray

from service.errors import FileRefused, FileTooLarge, InvalidCells

FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_SZIP: "szip",
    h5py.h5z.FILTER_NBIT: "nbit",
    h5py.h5z.FILTER_SCALEOFFSET: "scaleoffset",
    h5py.h5z.FILTER_LZF: "lzf",
}
"""What this build of HDF5 undoes by itself; further filters are code that a server would have to load."""

MAX_CHUNK_BYTES = 128 * 2**20
"""Of one HDF5 chunk, which is decompressed as a whole."""

MAX_NAME_BYTES = 4096
"""Of a fixed-length string."""

MAX_NAME = 256
"""Characters, as in every format."""

NAMES_AT_ONCE = 4096
_MAX_ATTRIBUTE = 64


class PlainFile:
    """Groups and datasets by path. Links of other kinds than hard ones are not followed, and each dataset is looked at before it is read."""

    def __init__(self, file: h5py.File, max_bytes: int) -> None:
        """Look at an open file; datasets that declare more than `max_bytes` once decompressed are refused."""
        self._file, self._max_bytes = file, max_bytes
        self.at = "the file"
        """The path that was touched last, for messages."""

    def find(self, path: str) -> h5py.Group | h5py.Dataset | None:
        """What is at a path; None where nothing is.

        Raises:
            FileRefused: the way there goes over a soft or external link.
        """
        here: Any = self._file
        parts = path.split("/")
        for number, part in enumerate(parts):
            self.at = "/".join(parts[: number + 1])
            if not isinstance(here, h5py.Group) or not part:
                return None
            link = here.get(part, getlink=True)
            if link is None:
                return None
            if not isinstance(link, h5py.HardLink):
                kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
                raise FileRefused(
                    path=self.at, found=kind, advice="Write the file anew with anndata, which copies what it leads to."
                )
            here = here[part]
            if not isinstance(here, h5py.Group | h5py.Dataset):
                raise FileRefused(path=self.at, found="a named type", advice="Only groups and datasets are read.")
        return here

    def group(self, path: str) -> h5py.Group | None:
        """The group at a path, if there is one."""
        found = self.find(path)
        return found if isinstance(found, h5py.Group) else None

    def names(self, path: str) -> tuple[str, ...]:
        """Names of what a group holds, at most 20; none where there is no such group."""
        group = self.group(path)
        return tuple(name[:60] for name, _ in zip(group or (), range(20), strict=False))

    def dataset(self, path: str) -> h5py.Dataset | None:
        """The dataset at a path, if there is one; its values lie in the file and can be read here.

        Raises:
            FileRefused: they lie elsewhere, or need a filter or type that is not known here.
            FileTooLarge: they would take more room than is allowed.
        """
        found = self.find(path)
        if not isinstance(found, h5py.Dataset):
            return None
        plist = found.id.get_create_plist()
        if plist.get_layout() == h5d.VIRTUAL:
            raise FileRefused(
                path=path,
                found="a virtual data set",
                advice="Write the file anew with anndata, which copies its values.",
            )
        if plist.get_external_count():
            raise FileRefused(
                path=path,
                found="a data set in another file",
                advice="Write the file anew with anndata, which copies its values.",
            )
        for number in range(plist.get_nfilters()):
            code, _, _, name = plist.get_filter(number)
            if code not in FILTERS:
                known = name.decode(errors="replace")[:40] or str(code)
                raise FileRefused(
                    path=path,
                    found=f"compressed with '{known}' (filter {code})",
                    advice="Write the file with compression='gzip' or 'lzf', or without.",
                )
        item_bytes = found.id.get_type().get_size()
        chunk = found.chunks or ()
        for n_bytes, limit in (
            (_product(found.shape or ()) * item_bytes, self._max_bytes),
            (_product(chunk) * item_bytes if chunk else 0, MAX_CHUNK_BYTES),
        ):
            if n_bytes > limit:
                raise FileTooLarge(path=path, n_bytes=n_bytes, limit_bytes=limit)
        return found

    def numbers(self, path: str, n_axes: int, kinds: str = "uif") -> h5py.Dataset:
        """A dataset of plain numbers; of truth values too, where unsigned integers are allowed.

        Raises:
            InvalidCells: there is none, or with another number of axes.
            FileRefused: it holds something else.
        """
        found = self.dataset(path)
        if found is None:
            raise InvalidCells(problem=f"The file has no data set '{path}'.")
        if found.shape is None or len(found.shape) != n_axes:
            raise InvalidCells(problem=f"'{path}' has the shape {found.shape}, but must have {n_axes} axes.")
        kind = found.id.get_type().get_class()
        is_bool = kind == h5t.ENUM and found.dtype == np.bool_
        if kind not in (h5t.INTEGER, h5t.FLOAT) and not (is_bool and "u" in kinds):
            raise FileRefused(path=path, found=f"of type {_type_name(found)}", advice="Numbers are needed here.")
        if not is_bool and (found.dtype.kind not in kinds or found.dtype.itemsize > 8):
            raise FileRefused(
                path=path,
                found=f"of type {found.dtype}",
                advice=f"Numbers of another type are needed ({_spelled(kinds)}).",
            )
        return found

    def strings(self, path: str, limit: int, field: str | None = None) -> list[str]:
        """The words of a data set of strings, or of whole numbers; of a field of it, where it is a table.

        Raises:
            InvalidCells: there is none, with another number of axes, not UTF-8, or with more than `limit` entries.
            FileRefused: it holds something else.
        """
        found = self.dataset(path)
        if found is None or found.shape is None or len(found.shape) != 1:
            raise InvalidCells(problem=f"'{path}' must be a data set with one axis.")
        if found.shape[0] > limit:
            raise InvalidCells(problem=f"'{path}' has {found.shape[0]:,} names; at most {limit:,} are read here.")
        dtype = found.dtype if field is None else found.dtype[field]
        is_text = h5py.check_string_dtype(dtype) is not None
        if (not is_text and (dtype.kind not in "ui" or h5py.check_enum_dtype(dtype))) or (
            dtype.kind == "S" and dtype.itemsize > MAX_NAME_BYTES
        ):
            raise FileRefused(path=path, found=f"of type {_type_name(found)}", advice="Names are needed here: strings.")
        words: list[str] = []
        source = found if field is None else found.fields(field)
        for start in range(0, found.shape[0], NAMES_AT_ONCE):
            for word in source[start : start + NAMES_AT_ONCE]:
                try:
                    words.append(word.decode() if isinstance(word, bytes) else str(word))
                except UnicodeDecodeError:
                    raise InvalidCells(problem=f"Entry {len(words):,} of '{path}' is not UTF-8.") from None
                if len(words[-1]) > MAX_NAME:
                    raise InvalidCells(
                        problem=f"Entry {len(words) - 1:,} of '{path}' has more than {MAX_NAME} characters."
                    )
        return words

    def attribute(self, path: str, name: str) -> Any:
        """A small attribute: a string, or an array of whole numbers; None where there is none, or one of another kind."""
        here = self._file if path == "" else self.find(path)
        if here is None or name not in here.attrs:
            return None
        described = here.attrs.get_id(name)
        kind = described.get_type().get_class()
        if kind not in (h5t.STRING, h5t.INTEGER) or _product(described.shape or ()) > _MAX_ATTRIBUTE:
            return None
        value = here.attrs[name]
        return value.decode(errors="replace") if isinstance(value, bytes) else value


def native(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers in a type that numpy calculates with: little-endian, truth values as integers, no half precision."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and values.dtype.itemsize < 4:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("<"), copy=False)


def slices(n_values: int, n_at_once: int) -> Iterator[tuple[int, int]]:
    """From where to where, in pieces of `n_at_once`."""
    for start in range(0, n_values, n_at_once):
        yield start, min(start + n_at_once, n_values)


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for axis in shape:
        n *= int(axis)
    return n


def _type_name(found: h5py.Dataset) -> str:
    names = {
        h5t.INTEGER: "integer",
        h5t.FLOAT: "float",
        h5t.STRING: "string",
        h5t.BITFIELD: "bitfield",
        h5t.OPAQUE: "opaque",
        h5t.COMPOUND: "compound",
        h5t.REFERENCE: "reference",
        h5t.ENUM: "enumeration",
        h5t.VLEN: "lists of variable length",
        h5t.ARRAY: "arrays",
    }
    return names.get(found.id.get_type().get_class(), "an unknown type")


def _spelled(kinds: str) -> str:
    return ", ".join({"u": "unsigned", "i": "integer", "f": "float of at most 64 bits"}[kind] for kind in kinds)
