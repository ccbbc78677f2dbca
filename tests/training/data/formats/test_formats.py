"""Formats: every one gives the same cells, and a broken file names itself, what was expected and what was found."""

import gzip
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.training.data.formats.written import CELLS, COUNTS, IDS, KINDS, SYMBOLS, WRITERS, anndata
from training.config import DataFile
from training.data import formats, registry, source
from training.data.formats import DESCRIPTION, FORMATS
from training.data.formats.errors import BadFile, UnknownFormat

REAL = registry.cache_directory() / "formats"


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_cells(name: str, tmp_path: Path) -> None:
    """Seen from the file itself: counts, names, and what a format knows of labels and batches."""
    path = WRITERS[name](tmp_path, COUNTS)
    inferred = formats.infer(path)
    assert inferred == ("table" if name.endswith(("_cells", "_genes")) else name)
    cells = source.read(DataFile(name="mine", path=path))
    np.testing.assert_array_equal(cells.X.toarray(), COUNTS)
    assert cells.X.dtype == np.float32
    assert list(cells.obs_names) == CELLS
    assert list(cells.var["gene_symbol"]) == SYMBOLS
    has_ids = name in ("h5ad", "zarr", "loom", "cell_ranger_h5", "cell_ranger_folder", "gct")
    assert list(cells.var["gene_id"]) == (IDS if has_ids else [""] * 5)
    if name in ("h5ad", "zarr", "loom", "scvae_json"):
        assert list(cells.obs["cell_type"]) == KINDS
    assert list(cells.obs["batch"]) == (["0", "0", "0", "1", "1", "1"] if name == "loom" else ["mine"] * 6)


@pytest.mark.parametrize("name", ["h5ad", "zarr"])
def test_counts_may_stay_on_disk(name: str, tmp_path: Path) -> None:
    """Rows are read when they are asked for, and are the same."""
    cells = source.read(DataFile(name="mine", path=WRITERS[name](tmp_path, COUNTS), backed=True))
    assert not hasattr(cells.X, "toarray")
    np.testing.assert_array_equal(cells.X[2:4].toarray(), COUNTS[2:4])
    assert list(cells.var["gene_symbol"]) == SYMBOLS


def test_every_format_is_tested() -> None:
    """`table` is what the two tables are seen as."""
    assert {*FORMATS, DESCRIPTION} - {"table"} == set(WRITERS)


SPOILED = {
    "negative": (-1, "a negative count: -1 in cell 'AAAC2-1'"),
    "fraction": (0.5, "not whole"),
    "nan": (np.nan, "not finite|no number"),
}


@pytest.mark.parametrize("fault", SPOILED)
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_count_is_found(name: str, fault: str, tmp_path: Path) -> None:
    """The error names the file, the cell and the gene; a table says that a number is missing."""
    value, message = SPOILED[fault]
    counts = COUNTS.copy()
    counts[2, 2] = value
    path = WRITERS[name](tmp_path, counts)
    with pytest.raises(BadFile, match=message) as caught:
        source.read(DataFile(name="mine", path=path))
    assert caught.value.path.name in ("counts.tsv.gz", path.name)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


def spoiled_file(path: Path) -> Path:
    """The file to break: of a folder, the one with the counts."""
    if path.is_file():
        return path.parent / "counts.tsv.gz" if path.suffix == ".json" else path
    return next(iter([*path.glob("matrix.mtx.gz"), *path.glob("X/data/c/0"), *path.glob("X/data/0")]))


@pytest.mark.parametrize("fault", ["truncated", "empty", "other"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_broken_file_says_so(name: str, fault: str, tmp_path: Path) -> None:
    """A file cut in half, one without a byte, and one of something else."""
    path = WRITERS[name](tmp_path, COUNTS)
    broken = spoiled_file(path)
    content = broken.read_bytes()
    broken.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "other": b"%PDF-1.7 \xff\xfe"}[fault])
    if name == "cells_by_genes" and fault == "truncated":
        # Half a table without compression may still be a table: end it within a row.
        broken.write_bytes(content[: content.rindex(b",")])
    with pytest.raises(BadFile) as caught:
        formats.read(path, name)
    assert str(caught.value).startswith(str(tmp_path))
    assert caught.value.expected
    assert caught.value.found


def remove_from_hdf5(path: Path, member: str) -> None:
    with h5py.File(path, "a") as file:
        del file[member]


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("h5ad", "X"),
        ("h5ad", "var"),
        ("loom", "matrix"),
        ("loom", "col_attrs"),
        ("cell_ranger_h5", "matrix/indptr"),
        ("cell_ranger_h5", "matrix/features"),
        ("scvae_hdf5", "shape"),
        ("zarr", "X"),
        ("zarr", "obs"),
        ("cell_ranger_folder", "barcodes.tsv.gz"),
        ("cell_ranger_folder", "features.tsv.gz"),
        ("cell_ranger_folder", "matrix.mtx.gz"),
        ("scvae_json", "labels.tsv"),
    ],
)
def test_a_missing_member_is_named(name: str, member: str, tmp_path: Path) -> None:
    """Of HDF5, of a folder, or beside a description."""
    path = WRITERS[name](tmp_path, COUNTS)
    if path.suffix == ".json":
        (tmp_path / member).unlink()
    elif not path.is_dir():
        remove_from_hdf5(path, member)
    elif (path / member).is_dir():
        shutil.rmtree(path / member)
    else:
        (path / member).unlink()
    with pytest.raises(BadFile) as caught:
        source.read(DataFile(name="mine", path=path, format=name))
    assert caught.value.expected


@pytest.mark.parametrize(("name", "place"), [("h5ad", "X/data"), ("loom", "matrix"), ("scvae_hdf5", "data")])
def test_values_of_another_type_are_refused(name: str, place: str, tmp_path: Path) -> None:
    """Text is not counts."""
    path = WRITERS[name](tmp_path, COUNTS)
    with h5py.File(path, "a") as file:
        shape = file[place].shape
        del file[place]
        file[place] = np.full(shape, b"x")
    with pytest.raises(BadFile, match="expected"):
        source.read(DataFile(name="mine", path=path))


def test_text_in_a_table_is_named(tmp_path: Path) -> None:
    """With its column."""
    (tmp_path / "counts.csv").write_text("cell,ACTB,GAPDH\na,1,2\nb,3,many\n")
    with pytest.raises(BadFile, match="'many' in column 'GAPDH'"):
        formats.read(tmp_path / "counts.csv")


def test_a_table_that_could_be_either_way_round_is_refused(tmp_path: Path) -> None:
    """Until the format says which."""
    (tmp_path / "counts.csv").write_text(",x,y,z\na,1,2,0\nb,3,1,1\n")
    with pytest.raises(BadFile, match="genes_by_cells or cells_by_genes"):
        formats.read(tmp_path / "counts.csv")
    assert formats.read(tmp_path / "counts.csv", "genes_by_cells").shape == (3, 2)
    assert formats.read(tmp_path / "counts.csv", "cells_by_genes").shape == (2, 3)


def test_names_that_do_not_fit_the_matrix(tmp_path: Path) -> None:
    """Barcodes, features and matrix of Cell Ranger agree, and so do a GCT's second line and its table."""
    path = WRITERS["cell_ranger_folder"](tmp_path, COUNTS)
    with gzip.open(path / "barcodes.tsv.gz", "wt") as file:
        file.write("one\n")
    with pytest.raises(BadFile, match="1 cells, as features and barcodes list; found 5 x 6"):
        formats.read(path)
    gct = WRITERS["gct"](tmp_path, COUNTS)
    with gzip.open(gct, "rt") as file:
        text = file.read()
    with gzip.open(gct, "wt") as file:
        file.write(text.replace("5\t6\n", "50\t6\n"))
    with pytest.raises(BadFile, match="50 genes x 6 samples, as line 2 says; found 5 x 6"):
        formats.read(gct)


def test_scvaes_matrix_may_lie_either_way_round(tmp_path: Path) -> None:
    """The lengths of the names decide."""
    path = WRITERS["scvae_hdf5"](tmp_path, COUNTS)
    with h5py.File(path, "a") as file:
        file["shape"][...] = COUNTS.shape[::-1]  # CSC of a matrix is CSR of its transpose
    np.testing.assert_array_equal(formats.read(path).X.toarray(), COUNTS)


def test_a_description_without_values_or_with_an_address(tmp_path: Path) -> None:
    """Nothing is downloaded."""
    path = tmp_path / "cells.json"
    for document, message in (
        ({"labels": "x"}, "no file of values"),
        ({"values": "http://127.0.0.1/x.tsv"}, "Download it"),
        ({"values": "absent.tsv"}, r"absent\.tsv"),
        ([], "a list"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(BadFile, match=message):
            formats.read(path)


def test_a_label_for_every_cell(tmp_path: Path) -> None:
    """By name, or one a line."""
    path = WRITERS["scvae_json"](tmp_path, COUNTS)
    (tmp_path / "labels.tsv").write_text("AAAC0-1\tB\n")
    with pytest.raises(BadFile, match="none for 5 cells, first 'AAAC1-1'"):
        formats.read(path)
    (tmp_path / "labels.tsv").write_text("".join(f"{kind}\n" for kind in KINDS))
    assert list(formats.read(path).obs["cell_type"]) == KINDS


def test_layers_and_raw(tmp_path: Path) -> None:
    """Normalised X is refused with advice; the layer or raw with counts is taken."""
    cells = anndata()
    cells.layers["counts"] = cells.X.copy()
    cells.raw = cells.copy()
    cells.X = cells.X * 0.3
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(BadFile, match="Name the `layer`"):
        source.read(DataFile(name="mine", path=tmp_path / "cells.h5ad"))
    for layer in ("counts", "raw"):
        found = source.read(DataFile(name="mine", path=tmp_path / "cells.h5ad", layer=layer))
        np.testing.assert_array_equal(found.X.toarray(), COUNTS)
    with pytest.raises(BadFile, match="the layers counts"):
        source.read(DataFile(name="mine", path=tmp_path / "cells.h5ad", layer="spliced"))


def test_columns_are_renamed_and_missed(tmp_path: Path) -> None:
    """A configuration speaks of cell_type whatever the file calls it."""
    path = WRITERS["h5ad"](tmp_path, COUNTS)
    found = source.read(DataFile(name="mine", path=path, columns={"kind": "cell_type"}))
    assert list(found.obs["kind"]) == KINDS
    with pytest.raises(BadFile, match="'CellType' in obs, for kind; found the columns cell_type"):
        source.read(DataFile(name="mine", path=path, columns={"kind": "CellType"}))
    with pytest.raises(BadFile, match="'ids' in var; found the columns gene_symbol"):
        source.read(DataFile(name="mine", path=path, gene_id="ids"))


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    """No such file, no such format, none that could be meant, none that can stay on disk."""
    with pytest.raises(BadFile, match="nothing there"):
        formats.read(tmp_path / "absent.h5ad")
    (tmp_path / "cells.xyz").write_text("")
    with pytest.raises(UnknownFormat, match="cannot be seen from the name"):
        formats.read(tmp_path / "cells.xyz")
    with pytest.raises(UnknownFormat, match="no format 'excel'"):
        formats.read(tmp_path / "cells.xyz", "excel")
    with pytest.raises(UnknownFormat, match="is a folder"):
        formats.read(tmp_path)
    with pytest.raises(UnknownFormat, match="those of h5ad, zarr can"):
        formats.read(WRITERS["loom"](tmp_path, COUNTS), backed=True)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["something"] = 1
    with pytest.raises(UnknownFormat, match="Members: something"):
        formats.read(tmp_path / "other.h5")


@pytest.mark.parametrize(
    ("name", "shape", "total"),
    [
        ("loom/scvi_retina.loom", (25, 1316), 2825),
        ("loom/loompy_test.loom", (200, 20), 0),
        ("10x_filtered_feature_bc_matrix.h5", (1107, 507), 41549),
        ("10x_mtx", (1107, 507), 41549),
        ("gct/rnaseqc_gene_reads.gct.gz", (1, 56202), 1412354),
        ("h5ad/anndata_v0.7.0.h5ad", (30, 20), 285),
        ("h5ad/cellxgene_schema_example_valid.h5ad", (320, 136), 176783),
    ],
)
def test_real_files(name: str, shape: tuple[int, int], total: float) -> None:
    """As they were published; the totals are those of the files' own matrices."""
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not in {REAL}")
    cells = source.read(DataFile(name="real", path=REAL / name))
    assert cells.shape == shape
    assert cells.X.sum(dtype=np.float64) == total
    assert cells.obs_names.is_unique
    assert cells.var_names.is_unique


def test_the_two_outputs_of_cell_ranger_agree() -> None:
    """The published .h5 and the published folder hold the same cells."""
    if not REAL.exists():
        pytest.skip(f"no {REAL}")
    one, other = (
        source.read(DataFile(name="real", path=REAL / name))
        for name in ("10x_filtered_feature_bc_matrix.h5", "10x_mtx")
    )
    assert (one.X != other.X).nnz == 0
    assert list(one.obs_names) == list(other.obs_names)
    assert one.var.equals(other.var)
