"""Out of core: counts that stay on disk train to the same bits as counts in memory."""

import gc
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.training.tiny import SETTINGS, tiny_cells, tiny_config
from training import run
from training.data import stored_cells
from training.data.formats.errors import BadFile
from training.data.prepared import prepare, split_reference
from training.data.reference import load_reference
from training.data.stored_cells import StoredCells


def written(folder: Path, kind: str) -> Path:
    """The first tiny set, with a gene that has no name of its own, as a file."""
    cells = tiny_cells("tiny_a")
    cells.var["gene_id"] = [*cells.var["gene_id"][:-2], "ENSG00000000001", ""]
    cells.var["gene_symbol"] = [*cells.var["gene_symbol"][:-1], ""]
    path = folder / f"cells.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr 3's own changes
        getattr(cells, f"write_{kind}")(path)
    return path


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_cells_on_disk_train_to_the_same_bits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters, genes, statistics, order and weights; the file is read in blocks, and nothing is left behind."""
    monkeypatch.setattr(stored_cells, "ROWS", 7)
    path = written(tmp_path, kind)

    def fit(backed: bool) -> run.Run:
        config = tiny_config(
            data=[{"name": "mine", "path": path, "backed": backed, "gene_id": "gene_id"}],
            cells={"min_counts": 40, "drop": {"cell_type": ["NK"]}},
            labels=[{"name": "cell_type", "classes": {"B": None, "CD4 T": None}}],
            fit={**SETTINGS["fit"], "balance": 0.5},
        )
        return run.fit(config, tmp_path / str(backed), show_progress=False)

    stored, in_memory = fit(True), fit(False)
    assert isinstance(stored.prepared.train, StoredCells)
    assert stored.prepared.var.equals(in_memory.prepared.var)
    assert stored.split == in_memory.split
    assert (tmp_path / "True/weights.npz").read_bytes() == (tmp_path / "False/weights.npz").read_bytes()
    again = run.load(tmp_path / "True")
    assert again.prepared.var.equals(stored.prepared.var)
    del stored, again
    gc.collect()
    assert not list((tmp_path / "True").glob("cells-*"))


def test_rows_come_in_any_order(tmp_path: Path) -> None:
    """As from memory, repeated ones too."""
    config = tiny_config(data=[{"name": "mine", "path": written(tmp_path, "h5ad"), "backed": True}])
    reference = load_reference(config.data)
    prepared = prepare(config, reference, split_reference(config, reference), tmp_path)
    everything = prepared.train.counts
    positions = np.array([5, 0, 5, 40, 3])
    found = prepared.train.take(positions)
    np.testing.assert_array_equal(found.counts.toarray(), everything[positions].toarray())
    assert list(found.names) == [prepared.train.names[i] for i in positions]


def test_what_is_no_count_is_found_on_disk_too(tmp_path: Path) -> None:
    """When its row is read, with its cell."""
    cells = tiny_cells("tiny_a")
    cells.X = cells.X * 0.5
    cells.write_h5ad(tmp_path / "cells.h5ad")
    config = tiny_config(data=[{"name": "mine", "path": tmp_path / "cells.h5ad", "backed": True}])
    reference = load_reference(config.data)
    with pytest.raises(BadFile, match=r"mine: expected raw counts; found a count that is not whole.*mine/cell"):
        prepare(config, reference, split_reference(config, reference), tmp_path)
