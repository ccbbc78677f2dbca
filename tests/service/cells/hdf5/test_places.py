"""Where counts, genes and cells are in an .h5ad file, in all the forms that AnnData has given them."""

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from service.cells.file_processes import FileProcesses
from service.cells.hdf5 import matrices
from service.cells.hdf5.plain import PlainFile
from service.errors import FileRefused, InvalidCells, InvalidOption, NoRawCounts
from tests.builders import counts, gene_table
from tests.service.cells.hdf5.conftest import logged
from tests.service.cells.hdf5.reading import changed, read, replace, same

COUNTS = counts(7)
SYMBOLS, IDS = list(gene_table().gene_symbol), list(gene_table().gene_id)
FORMS: dict[str, Callable[[sp.csr_matrix], object]] = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "dense": lambda matrix: matrix.toarray(),
}


def in_x(adata: ad.AnnData, matrix: object) -> None:
    adata.X = matrix


def in_raw(adata: ad.AnnData, matrix: object) -> None:
    adata.X = matrix
    adata.raw = adata
    adata.X = logged(COUNTS)


def in_layer(adata: ad.AnnData, matrix: object) -> None:
    adata.layers["counts"] = matrix
    adata.X = logged(COUNTS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("put", "place"), [(in_x, "X"), (in_raw, "raw/X"), (in_layer, "layers/counts")])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"compression": "lzf"}])
def test_places_and_forms(
    processes: FileProcesses,
    adata: ad.AnnData,
    tmp_path: Path,
    form: str,
    put: Callable[[ad.AnnData, object], None],
    place: str,
    options: dict[str, str],
) -> None:
    """csr, csc and dense counts in X, raw/X and a layer are found and read, whatever stands beside them, and the place is named."""
    put(adata, FORMS[form](COUNTS))
    adata.write_h5ad(tmp_path / "a.h5ad", **options)

    head, found = read(processes, tmp_path / "a.h5ad")

    assert head == {"genes": SYMBOLS, "cell_ids": list(adata.obs_names), "place": place}
    assert same(found, COUNTS)


@pytest.mark.parametrize(
    "dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ">i4", ">f4", ">f8", "?"]
)
@pytest.mark.parametrize("form", FORMS)
def test_types(processes: FileProcesses, path: Path, dtype: str, form: str) -> None:
    """Numbers of all types that numpy calculates with are read, of both byte orders; columns of 64 bits too."""
    few = COUNTS.astype("i8")
    few.data = few.data % 2 if dtype == "?" else few.data
    matrix = FORMS[form](few)
    with changed(path) as file:
        del file["X"]
        if form == "dense":
            file["X"] = matrix.astype(dtype)
        else:
            group = file.create_group("X")
            group.attrs["encoding-type"], group.attrs["shape"] = f"{form}_matrix", few.shape
            group["data"], group["indices"], group["indptr"] = (
                matrix.data.astype(dtype),
                matrix.indices.astype("i8"),
                matrix.indptr.astype("i8"),
            )

    assert same(read(processes, path)[1], few)


@pytest.mark.parametrize("chunks", [None, (1, 40), (7, 1), (3, 7), (100, 100)])
def test_dense_chunks(processes: FileProcesses, path: Path, chunks: tuple[int, int] | None) -> None:
    """However a dense matrix is cut into chunks, it is the same."""
    with changed(path) as file:
        del file["X"]
        file.create_dataset("X", data=COUNTS.toarray(), chunks=chunks, maxshape=(None, None) if chunks else None)

    assert same(read(processes, path)[1], COUNTS)


@pytest.mark.parametrize("form", FORMS)
def test_small_blocks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Rows come in order and whole, however few are read at a time; a csc matrix through many buckets."""
    monkeypatch.setattr(matrices, "BLOCK_VALUES", 37)
    monkeypatch.setattr(matrices, "BUCKET_VALUES", 90)
    dense = counts(200, seed=4).toarray()
    dense[17:40] = 0
    many = sp.csr_matrix(dense)
    adata = ad.AnnData(FORMS[form](many))
    adata.write_h5ad(path)
    with h5py.File(path) as file, (tmp_path / "scratch").open("w+b") as scratch:
        blocks = list(matrices.open_matrix(PlainFile(file, 2**26), "X").blocks(scratch.fileno()))

    found = sp.vstack([sp.csr_matrix((b.values, b.indices, b.indptr), (len(b.indptr) - 1, 40)) for b in blocks])
    assert same(sp.csr_matrix(found), many)
    assert len(blocks) > 50
    assert max(len(block.values) for block in blocks) <= 40


def test_a_csc_matrix_of_many_values(processes: FileProcesses, tmp_path: Path) -> None:
    """More values than are sorted at a time: the transposed matrix is scipy's, in bounded memory."""
    random = np.random.default_rng(0)
    matrix = sp.csc_matrix(random.integers(1, 9, (6000, 3000), dtype=np.int8) * (random.random((6000, 3000)) < 0.3))
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        for name, length in (("obs", 6000), ("var", 3000)):
            file.create_group(name).attrs["_index"] = "_index"
            file[name]["_index"] = np.array([f"{name}{number}" for number in range(length)], dtype=h5py.string_dtype())
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csc_matrix", matrix.shape
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
    assert matrix.nnz > matrices.BUCKET_VALUES

    _, found = read(processes, tmp_path / "a.h5ad", max_cells=10_000)

    assert (found != matrix.tocsr()).nnz == 0


def test_chosen_places(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """What the client names is taken, whatever else there is; what is not there is refused with what is."""
    double = COUNTS * 2
    adata.layers["counts"], adata.layers["spliced"] = COUNTS, double
    adata.write_h5ad(path)

    assert same(read(processes, path, layer="spliced")[1], double)
    assert read(processes, path, layer="X")[0]["place"] == "X"
    with pytest.raises(InvalidOption, match=r"no 'layers/unspliced'\. It has: X, layers/counts, layers/spliced"):
        read(processes, path, layer="unspliced")
    with pytest.raises(InvalidOption, match="no 'raw/X'"):
        read(processes, path, use_raw=True)
    with pytest.raises(InvalidOption, match=r"no 'layers/\.\./X'"):
        read(processes, path, layer="../X")


def test_raw_has_genes_of_its_own(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """raw/X has more genes than X, and is read with its own var."""
    adata.raw = adata
    fewer = adata[:, 5:9].copy()
    fewer.X = logged(sp.csr_matrix(fewer.X))
    fewer.write_h5ad(path)

    head, found = read(processes, path)
    assert (head["place"], head["genes"]) == ("raw/X", SYMBOLS)
    assert same(found, COUNTS)
    assert read(processes, path, use_raw=True, gene_key="gene_id")[0]["genes"] == IDS


def test_never_normalised_values(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """Where no place holds counts, that is said of each, with the layers that could be named; a single place is left to be judged whole."""
    adata.raw = adata
    adata.raw._X = logged(COUNTS)
    adata.X = logged(COUNTS).toarray() - 1
    adata.layers["spliced"] = COUNTS
    adata.write_h5ad(path)

    with pytest.raises(
        NoRawCounts, match=r"raw/X: fractional values, up to .*; X: negative values, .* layers are: spliced\."
    ):
        read(processes, path)

    ad.AnnData(logged(COUNTS)).write_h5ad(path)
    assert read(processes, path)[0]["place"] == "X"


def test_without_x(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """A file without X is read where a layer has the counts, and refused where nothing has."""
    adata.layers["counts"] = adata.X
    adata.X = None
    adata.write_h5ad(path)
    assert same(read(processes, path)[1], COUNTS)

    del adata.layers["counts"]
    adata.write_h5ad(path)
    with pytest.raises(NoRawCounts, match="neither layers/counts nor raw/X nor X"):
        read(processes, path)


def test_gene_columns(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """Names of genes come from any column of var: strings, categories, strings that may be missing and are not; and no other."""
    adata.var["category"] = pd.Categorical(IDS)
    adata.var["number"] = np.arange(40)
    adata.var["share"] = np.linspace(0, 1, 40)
    adata.write_h5ad(path)
    with changed(path) as file:
        for name in ("whole", "missing"):
            group = file["var"].create_group(name)
            group["values"] = np.array(IDS, dtype=h5py.string_dtype())
            group["mask"] = np.arange(40) == (3 if name == "missing" else -1)

    assert read(processes, path, gene_key="gene_id")[0]["genes"] == IDS
    assert read(processes, path, gene_key="category")[0]["genes"] == IDS
    assert read(processes, path, gene_key="whole")[0]["genes"] == IDS
    assert read(processes, path, gene_key="number")[0]["genes"][:2] == ["0", "1"]
    with pytest.raises(InvalidCells, match="'var/missing' has missing values"):
        read(processes, path, gene_key="missing")
    with pytest.raises(FileRefused, match="'var/share'"):
        read(processes, path, gene_key="share")
    with pytest.raises(InvalidOption, match=r"'var' has no column 'nope'; there are: .*gene_id"):
        read(processes, path, gene_key="nope")
    with changed(path) as file:
        file["var/category/codes"][0] = -1
    with pytest.raises(InvalidCells, match="'var/category' has missing values"):
        read(processes, path, gene_key="category")
    with changed(path) as file:
        file["var/category/codes"][0] = 99
    with pytest.raises(InvalidCells, match="none of its 40 categories"):
        read(processes, path, gene_key="category")


def test_duplicated_names(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """Names that occur twice are given twice: what becomes of them is said elsewhere."""
    with changed(path) as file:
        replace(file["var"], "_index", np.array(["G1"] * 40, dtype=h5py.string_dtype()))
        replace(file["obs"], "_index", np.array(["same"] * 7, dtype=h5py.string_dtype()))

    head, _ = read(processes, path)
    assert (set(head["genes"]), head["cell_ids"]) == ({"G1"}, ["same"] * 7)


def test_anndata_0_7(processes: FileProcesses, path: Path) -> None:
    """Categories beside the table, with a reference to them, as anndata 0.7 wrote them."""
    with changed(path) as file:
        for name in file["X"].attrs:
            if name == "encoding-version":
                file["X"].attrs[name] = "0.1.0"
        file["var"].attrs["encoding-version"] = "0.1.0"
        file["var/__categories/symbol"] = np.array(sorted(SYMBOLS), dtype=h5py.string_dtype())
        codes = [sorted(SYMBOLS).index(symbol) for symbol in SYMBOLS]
        file["var/symbol"] = np.array(codes, "i1")
        file["var/symbol"].attrs["categories"] = file["var/__categories/symbol"].ref

    assert read(processes, path, gene_key="symbol")[0]["genes"] == SYMBOLS
    with pytest.raises(InvalidOption):
        read(processes, path, gene_key="__categories")


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_anndata_0_6(processes: FileProcesses, tmp_path: Path, form: str) -> None:
    """Tables of HDF5's own, sparse matrices by h5sparse, raw.X and raw.var at the root, as anndata before 0.7 wrote them."""
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        obs = np.array([(f"cell-{number}".encode(), number) for number in range(7)], [("index", "S10"), ("n", "i4")])
        var = np.array(
            [(s.encode(), i.encode(), n % 3) for n, (s, i) in enumerate(zip(SYMBOLS, IDS, strict=True))],
            [("index", "S20"), ("gene_id", "S20"), ("kind", "i1")],
        )
        file["obs"], file["var"], file["raw.var"] = obs, var, var
        file["uns/kind_categories"] = np.array([b"a", b"b", b"c"])
        file["X"] = logged(COUNTS).toarray()
        group, matrix = file.create_group("raw.X"), FORMS[form](COUNTS)
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = form.encode(), COUNTS.shape
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr

    head, found = read(processes, path)

    assert head == {"genes": SYMBOLS, "cell_ids": [f"cell-{number}" for number in range(7)], "place": "raw/X"}
    assert same(found, COUNTS)
    assert read(processes, path, gene_key="gene_id")[0]["genes"] == IDS
    assert read(processes, path, gene_key="kind")[0]["genes"][:4] == ["a", "b", "c", "a"]


def test_not_a_number_is_found(processes: FileProcesses, adata: ad.AnnData, path: Path) -> None:
    """NaN in a dense matrix is no zero: it arrives, to be refused as what it is."""
    dense = COUNTS.toarray()
    dense[4, 11] = np.nan
    adata.X = dense
    adata.write_h5ad(path)

    assert np.isnan(read(processes, path)[1][4, 11])
