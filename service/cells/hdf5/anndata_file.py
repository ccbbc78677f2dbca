"""Where AnnData keeps things on disk, of all its versions: counts, names of genes, names of cells. Used in the parse process only.

https://anndata.readthedocs.io/en/latest/fileformat-prose.html; before 0.7 obs and var were tables of HDF5's own, and raw.X and raw.var lay
at the root.
"""

import h5py
import numpy as np

from service.cells.hdf5.matrices import Matrix, open_matrix
from service.cells.hdf5.plain import PlainFile
from service.errors import FileRefused, InvalidCells, InvalidOption, NoCells, NoRawCounts, TooManyCells

MAX_GENES = 200_000
CANDIDATES = ("layers/counts", "raw/X", "X")
"""Where raw counts are looked for, unless the client says where they are."""


class AnnDataFile:
    """What an .h5ad file holds of counts."""

    def __init__(self, file: PlainFile, max_cells: int) -> None:
        """Look at a file.

        Raises:
            InvalidCells: it is no AnnData file.
            NoCells, TooManyCells.
        """
        self._file = file
        if file.find("obs") is None or file.find("var") is None:
            raise InvalidCells(
                problem=f"The file has no 'obs' and 'var'{_other_format(file)}. Write it with AnnData.write_h5ad."
            )
        index = self._index("obs")
        length = self._length("obs", index)
        if length > max_cells:
            raise TooManyCells(n_cells=length, limit_cells=max_cells)
        if not length:
            raise NoCells
        self.n_cells = length
        self._obs_index = index

    def cell_ids(self) -> list[str]:
        """Names of the cells."""
        return self._column("obs", self._obs_index, self.n_cells)

    def genes(self, place: str, key: str | None) -> list[str]:
        """Names of the columns of the matrix at a place.

        Args:
            place: path of the matrix.
            key: column of var; the index where None.

        Raises:
            InvalidOption: there is no such column.
            InvalidCells: they are no names.
        """
        table = self._raw_var() if place == "raw/X" else "var"
        if key is None:
            return self._column(table, self._index(table), MAX_GENES)
        columns = self._columns(table)
        if key not in columns:
            known = ", ".join(columns[:20]) or "none"
            raise InvalidOption(name="gene_key", problem=f"'{table}' has no column '{key[:60]}'; there are: {known}.")
        return self._column(table, key, MAX_GENES)

    def counts(self, layer: str | None, use_raw: bool) -> tuple[Matrix, str]:
        """The matrix with the raw counts, and its path.

        Args:
            layer: name of a layer, or X; None to look for raw counts.
            use_raw: take raw/X.

        Raises:
            InvalidOption: there is no such place.
            NoRawCounts: none of the `CANDIDATES` holds raw counts.
        """
        if use_raw or layer is not None:
            place = "raw/X" if use_raw else "X" if layer == "X" else f"layers/{layer}"
            if self._file.find(self._path(place)) is None:
                raise InvalidOption(
                    name="use_raw" if use_raw else "layer",
                    problem=f"the file has no '{place[:80]}'. It has: {', '.join(self._places())}.",
                )
            return self._matrix(place), place
        found: dict[str, str] = {}
        candidates = [place for place in CANDIDATES if self._file.find(self._path(place)) is not None]
        for place in candidates:
            matrix = self._matrix(place)
            wrong = _looks(matrix.sample())
            # A single place is judged whole, value by value, with the cell and the gene that are wrong.
            if wrong is None or len(candidates) == 1:
                return matrix, place
            found[place] = wrong
        layers = self._file.names("layers")
        raise NoRawCounts(
            found="; ".join(f"{place}: {wrong}" for place, wrong in found.items())
            or "neither layers/counts nor raw/X nor X is there",
            layers=", ".join(layers) or "none",
        )

    def _matrix(self, place: str) -> Matrix:
        path = self._path(place)
        matrix = open_matrix(self._file, path)
        n_genes = self._length(*self._var_and_index(place))
        if matrix.shape != (self.n_cells, n_genes):
            raise InvalidCells(
                problem=f"'{place}' has the shape {matrix.shape[0]:,} by {matrix.shape[1]:,}, but there are {self.n_cells:,} cells in 'obs' "
                f"and {n_genes:,} genes in its 'var'."
            )
        return matrix

    def _var_and_index(self, place: str) -> tuple[str, str]:
        table = self._raw_var() if place == "raw/X" else "var"
        return table, self._index(table)

    def _path(self, place: str) -> str:
        return "raw.X" if place == "raw/X" and self._file.find("raw") is None else place

    def _raw_var(self) -> str:
        return "raw.var" if self._file.find("raw") is None else "raw/var"

    def _places(self) -> list[str]:
        places = [place for place in ("X", "raw/X") if self._file.find(self._path(place)) is not None]
        return places + [f"layers/{name}" for name in self._file.names("layers")]

    def _index(self, table: str) -> str:
        """Name of the column that holds the names of a table's rows."""
        rows = self._file.dataset(table)
        if rows is not None:  # before anndata 0.7: one table, whose first column is the index
            if not rows.dtype.names:
                raise InvalidCells(problem=f"'{table}' is neither a group nor a table.")
            return str(rows.dtype.names[0])
        for name in (self._file.attribute(table, "_index"), "_index", "index"):
            if isinstance(name, str) and self._file.find(f"{table}/{name}") is not None:
                return name
        raise InvalidCells(problem=f"'{table}' does not say which of its columns holds the names (_index).")

    def _length(self, table: str, column: str) -> int:
        rows = self._file.dataset(table)
        path = table if rows is not None else self._values_path(f"{table}/{column}")
        found = rows if rows is not None else self._file.dataset(path)
        if found is None or found.shape is None or len(found.shape) != 1:
            raise InvalidCells(problem=f"'{path}' must be a data set with one axis.")
        return int(found.shape[0])

    def _values_path(self, path: str) -> str:
        """The data set that has one entry per row: of categories their codes, of strings that may be missing their values."""
        if self._file.group(path) is None:
            return path
        return f"{path}/codes" if self._file.find(f"{path}/codes") is not None else f"{path}/values"

    def _columns(self, table: str) -> tuple[str, ...]:
        rows = self._file.dataset(table)
        if rows is not None:
            return tuple(rows.dtype.names or ())
        return tuple(name for name in self._file.group(table) or () if name != "__categories")

    def _column(self, table: str, name: str, limit: int) -> list[str]:
        """The words of a column."""
        path = f"{table}/{name}"
        if self._file.dataset(table) is not None:
            categories = f"uns/{name}_categories"
            if self._file.find(categories) is None or name == self._index(table):
                return self._file.strings(table, limit, field=name)
            return _chosen(path, self._file.strings(table, limit, field=name), self._file.strings(categories, limit))
        if self._file.group(path) is None:
            categories = f"{table}/__categories/{name}"  # anndata 0.7
            if self._file.find(categories) is None:
                return self._file.strings(path, limit)
            return _chosen(path, self._file.strings(path, limit), self._file.strings(categories, limit))
        if self._file.find(f"{path}/codes") is not None:
            codes = self._file.strings(f"{path}/codes", limit)
            return _chosen(path, codes, self._file.strings(f"{path}/categories", limit))
        if self._file.find(f"{path}/values") is None:
            raise FileRefused(
                path=path,
                found="a group of another kind",
                advice="Names are needed here: strings, or categories of strings.",
            )
        mask = self._file.find(f"{path}/mask")
        if isinstance(mask, h5py.Dataset) and len(mask) <= limit and np.any(self._file.numbers(f"{path}/mask", 1)[()]):
            raise InvalidCells(problem=f"'{path}' has missing values; names are needed.")
        return self._file.strings(f"{path}/values", limit)


def _chosen(path: str, codes: list[str], categories: list[str]) -> list[str]:
    try:
        numbers = [int(code) for code in codes]
        if any(number < 0 for number in numbers):
            raise InvalidCells(problem=f"'{path}' has missing values; names are needed.")
        return [categories[number] for number in numbers]
    except (ValueError, IndexError):
        raise InvalidCells(problem=f"'{path}' has a code that is none of its {len(categories):,} categories.") from None


def _looks(sample: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> str | None:
    """What is wrong with values that should be counts; None where they may be."""
    if not len(sample):
        return None
    lowest, highest = sample.min(), sample.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        return "values that are not finite"
    if lowest < 0:
        return f"negative values, down to {lowest:.3g}"
    if sample.dtype.kind == "f" and (sample != np.rint(sample)).any():
        return f"fractional values, up to {highest:.3g}"
    return None


def _other_format(file: PlainFile) -> str:
    """What a file that is no AnnData may be."""
    if file.find("row_attrs") is not None and file.find("col_attrs") is not None:
        return ": it is a loom file"
    if file.find("matrix/barcodes") is not None:
        return ": it is a 10x Genomics file"
    if file.find("mod") is not None:
        return ": it is a MuData file; send one of its modalities"
    return ""
