"""What is done with a finished run and more cells: nothing that was known is lost, and what changes is what was meant to."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from sklearn.metrics import accuracy_score
from typer.testing import CliRunner

from service.contract import artifact
from service.inference.model import load
from service.inference.reconstruct import ReconstructOptions
from service.inference.session import Runtime
from tests.training.tiny import TYPES, register, tiny_cells, tiny_config
from training import cli, run, start, transfer
from training import export as exporting
from training.config import Config, DataFile

FIT = {"max_epochs": 12, "patience": 12, "rows": 16, "learning_rate": 0.01, "device": "cpu"}
ATLAS = {"family": "atlas_vae", "model": {"hidden": [16], "n_latent": 4}, "fit": FIT}


def config(**changes: Any) -> Config:
    """A tiny atlas_vae."""
    return tiny_config(**{**ATLAS, **changes})


@pytest.fixture(scope="module", autouse=True)
def tiny_sets() -> Iterator[None]:
    """The tiny data sets are in the registry."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        yield


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> tuple[run.Run, Path]:
    """A run on the first tiny set, and its directory."""
    directory = tmp_path_factory.mktemp("parent") / "run"
    return run.fit(config(data=["tiny_a"]), directory, show_progress=False), directory


def encode(made: run.Run, cells: AnnData) -> np.ndarray:
    """Latent of cells that have the model's genes."""
    counts = torch.from_numpy(cells[:, made.prepared.var.index].X.toarray())
    with torch.no_grad():
        return made.family.eval().graphs()["encode"].module(counts).numpy()


def write(path: Path, cells: AnnData) -> DataFile:
    """The cells as a file of the user's."""
    cells.write_h5ad(path)
    return DataFile(name=path.stem, path=path)


def test_a_query_is_mapped_without_training(parent: tuple[run.Run, Path]) -> None:
    """Cells of a batch that was never seen get an embedding and the right labels, with the report of their genes."""
    made, _ = parent
    query = tiny_cells("tiny_b")[:, ::-1].copy()
    answer = transfer.map_query(made, query)

    np.testing.assert_allclose(answer.obsm["X_tiny"], encode(made, query), atol=1e-4)
    assert accuracy_score(query.obs["cell_type"], answer.obs["predicted_labels"].astype(str)) > 0.9
    assert '"n_matched": 40' in answer.uns["cellserve"]["map"]
    assert "names" not in "".join(answer.var.columns)


def test_an_unseen_batch_is_decoded_with_the_average_code(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """The exported model takes the average embedding for it, or a batch that the configuration names, and the answer says so."""
    made, _ = parent
    model = load(artifact.read(exporting.export(made, tmp_path)), Runtime())
    latent, library = model.encode(made.test_cells.X), np.full(made.test_cells.n_obs, 100, np.float32)
    with torch.no_grad():
        index = torch.full((len(latent),), made.family.batches.n_batches)
        expected = made.family.decode(torch.from_numpy(latent), torch.from_numpy(library), index).numpy()

    np.testing.assert_allclose(model.decode(latent, library), expected, rtol=1e-4, atol=1e-4)
    about = ReconstructOptions(batch="somewhere else").about(model)["batch"]
    assert about == {
        "asked": "somewhere else",
        "decoded_as": "average",
        "is_known": False,
        "average_of": "batch codes",
    }
    named = made.config.model_copy(
        update={"export": made.config.export.model_copy(update={"decode_default": "tiny_a"})}
    )
    model = load(artifact.read(exporting.export(dataclasses.replace(made, config=named), tmp_path)), Runtime())
    assert ReconstructOptions(batch="somewhere else").about(model)["batch"]["decoded_as"] == "tiny_a"


def test_fitting_new_codes_only_leaves_all_else_as_it_is(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """Embeddings, labels and the codes of known batches keep their bits; the new batch has a code of its own, which explains it better."""
    before, directory = parent
    made = run.fit(transfer.fine_tuning(before, directory, ["tiny_b"], True), tmp_path / "run", show_progress=False)
    new, old = made.family.state_dict(), before.family.state_dict()

    assert made.prepared.batches == ("tiny_a", "tiny_b")
    same = {name for name in old if new[name].shape == old[name].shape and torch.equal(new[name], old[name])}
    assert set(old) - same == {"batches.table_0"}
    assert torch.equal(new["batches.table_0"][0], old["batches.table_0"][0])
    assert not torch.allclose(new["batches.table_0"][1], old["batches.table_0"][0])
    query = made.test_cells
    assert encode(made, query).tobytes() == encode(before, query).tobytes()
    losses = pd.read_csv(tmp_path / "run/metrics.csv")["validation_loss"]
    assert losses.iloc[-1] < losses.iloc[0]


def test_fine_tuning_begins_where_the_run_ended(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """After one epoch the loss on the query is below that of random weights; the run can be read without the one it began with."""
    before, directory = parent
    moved = shutil.copytree(directory, tmp_path / "parent")
    wanted = transfer.fine_tuning(before, moved, ["tiny_a", "tiny_b"], False)
    short = wanted.model_copy(update={"fit": wanted.fit.model_copy(update={"max_epochs": 1})})
    warm = run.fit(short, tmp_path / "warm", show_progress=False)
    cold = run.fit(short.model_copy(update={"start": None}), tmp_path / "cold", show_progress=False)

    assert warm.provenance["best_validation_loss"] < cold.provenance["best_validation_loss"]
    assert list(warm.prepared.var.index) == list(before.prepared.var.index)
    shutil.rmtree(moved)
    again = run.load(tmp_path / "warm")
    assert encode(again, warm.test_cells).tobytes() == encode(warm, warm.test_cells).tobytes()


def test_a_query_may_lack_genes_and_labels(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """Genes that it lacks count zero, down to the floor; its cells teach no class."""
    before, directory = parent
    cells = tiny_cells("tiny_b")
    del cells.obs["cell_type"]
    genes = before.prepared.var.index
    some = write(tmp_path / "some.h5ad", cells[:, genes[:30]].copy())
    made = run.fit(transfer.fine_tuning(before, directory, [some], False), tmp_path / "run", show_progress=False)

    assert made.reference[:, genes[30:]].X.nnz == 0
    assert made.reference[:, genes[:30]].X.sum() == cells[:, genes[:30]].X.sum()
    assert (made.prepared.train.labels == -1).all()
    few = write(tmp_path / "few.h5ad", cells[:, genes[:10]].copy())
    with pytest.raises(run.TooFewGenes, match=r"'few' has 25.0% of the genes"):
        run.fit(transfer.fine_tuning(before, directory, [few], False), tmp_path / "other", show_progress=False)


def test_retraining_keeps_the_embedding(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """On the genes that a query has, known cells stay where they were; without the constraint and the weights they do not."""
    before, directory = parent
    query = write(tmp_path / "query.h5ad", tiny_cells("tiny_b")[:, :45].copy())
    wanted = transfer.retraining(before, directory, [query], 1000.0)
    held = run.fit(wanted, tmp_path / "held", show_progress=False)
    free = run.fit(config(data=["tiny_a", query.model_dump()]), tmp_path / "free", show_progress=False)

    assert not set(held.prepared.var.index) & set(tiny_cells("tiny_b").var_names[45:])
    known = held.reference[held.reference.obs["dataset"] == "tiny_a"]
    old = encode(before, before.reference[known.obs_names])
    distances = [np.square(encode(made, known) - old).mean() for made in (held, free)]
    assert distances[0] < 0.2 * distances[1]
    assert np.isnan(held.prepared.train.obsm["X_start"]).any(axis=1).sum() == (held.prepared.train.batch == 1).sum()


def test_two_atlases_with_different_labels(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """Each level is learned from its own atlas's cells, and the classes that mean the same are found."""
    one, _ = parent
    cells = tiny_cells("tiny_b")
    cells.obs["kind"] = cells.obs["cell_type"].map(dict(zip(TYPES, ("b", "nk", "t"), strict=True)))
    del cells.obs["cell_type"]
    other_data = write(tmp_path / "other.h5ad", cells)
    level = {"name": "kind", "classes": {"b": None, "nk": None, "t": None}}
    other = run.fit(
        config(name="other", data=[other_data.model_dump()], labels=[level]), tmp_path / "two", show_progress=False
    )
    made = run.fit(transfer.integration(one, other), tmp_path / "both", show_progress=False)

    labels, is_first = made.prepared.train.labels, made.prepared.train.batch == 0
    assert (labels[is_first, 1] == -1).all()
    assert (labels[is_first, 0] >= 0).all()
    assert (labels[~is_first, 0] == -1).all()
    table = transfer.label_alignment(run.load(tmp_path / "both"))
    pairs = set(zip(table[table["is_match"]]["cell_type"], table[table["is_match"]]["kind"], strict=True))
    assert pairs == {("B", "b"), ("NK", "nk"), ("CD4 T", "t")}
    unlike = dataclasses.replace(other, config=other.config.model_copy(update={"batch_key": "batch"}))
    with pytest.raises(transfer.CannotIntegrate, match="batch_key"):
        transfer.integration(one, unlike)


def test_levels_of_one_name_are_told_apart(parent: tuple[run.Run, Path]) -> None:
    """Two atlases that both call their column cell_type keep two heads."""
    one, _ = parent
    levels = transfer.integration(one, one).labels
    assert [(level.name, level.column) for level in levels] == [
        ("cell_type_1", "cell_type"),
        ("cell_type_2", "cell_type"),
    ]


def test_everything_at_once_is_exported_and_served(tmp_path: Path) -> None:
    """TabNet, two batch levels, two label levels, one-hot codes: the graphs need nothing that serving does not allow."""
    model = {"hidden": [8], "n_latent": 4, "encoder": "tabnet", "batch_code": "one_hot", "dispersion": "gene_batch"}
    model |= {"mmd": "hierarchical", "mmd_weight": 1.0, "encode_library": True, "gate": "cell"}
    levels = [
        {"name": "cell_type", "classes": dict.fromkeys(TYPES)},
        {"name": "lineage", "column": "cell_type", "classes": {"B": None, "NK": None}},
    ]
    wanted = config(model=model, labels=levels, batch_key=["dataset", "published_split"])
    made = run.fit(wanted, tmp_path / "run", show_progress=False)
    found = load(artifact.read(exporting.export(made, tmp_path / "store")), Runtime())

    assert found.manifest.batch.names == ("tiny_a | train", "tiny_b | train")
    assert [level.name for level in found.manifest.labels] == ["cell_type", "lineage"]
    assert max(difference.absolute for difference in found.manifest.parity.outputs.values()) < 1e-3
    np.testing.assert_allclose(found.encode(made.test_cells.X.tocsr()), encode(made, made.test_cells), atol=1e-4)


def test_what_cannot_be_begun_with_is_refused(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """Another family, other widths, a family that cannot, no new batch: never a tensor that is left out in silence."""
    before, directory = parent

    def fit(wanted: Config, name: str) -> None:
        run.fit(wanted, tmp_path / name, show_progress=False)

    wanted = transfer.fine_tuning(before, directory, ["tiny_b"], False)
    with pytest.raises(start.CannotStart, match="one of atlas_vae"):
        fit(wanted.model_copy(update={"family": "vae", "model": {"hidden": [16], "n_latent": 4}}), "one")
    with pytest.raises(start.CannotStart, match=r"encoder.0.weight has shape \[16, 40\]"):
        fit(wanted.model_copy(update={"model": {"hidden": [12], "n_latent": 4}}), "two")
    with pytest.raises(start.CannotStart, match="no new code"):
        fit(transfer.fine_tuning(before, directory, ["tiny_a"], True), "three")
    autoencoder = run.fit(tiny_config(family="autoencoder"), tmp_path / "autoencoder", show_progress=False)
    with pytest.raises(start.CannotStart, match="autoencoder cannot begin"):
        fit(transfer.fine_tuning(autoencoder, tmp_path / "autoencoder", ["tiny_a"], False), "four")
    with pytest.raises(ValueError, match="weight_decay"):
        config(start={"run": "x", "train": "batches"})


def test_the_commands(parent: tuple[run.Run, Path], tmp_path: Path) -> None:
    """map, finetune, retrain and integrate, as a person types them."""
    _, directory = parent
    runner = CliRunner()
    query = tmp_path / "query.h5ad"
    tiny_cells("tiny_b").write_h5ad(query)
    short = ["--set", "fit.max_epochs=1"]
    for arguments in (
        ["map", str(directory), str(query), str(tmp_path / "mapped.h5ad")],
        ["finetune", str(directory), str(query), "--output", str(tmp_path / "a"), "--only-batches", *short],
        ["retrain", str(directory), "tiny_b", "--output", str(tmp_path / "b"), *short],
        ["integrate", str(directory), str(directory), "--output", str(tmp_path / "c"), *short],
    ):
        result = runner.invoke(cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "mapped.h5ad").exists()
    assert (tmp_path / "c/label_alignment.tsv").exists()
    assert run.load(tmp_path / "a").config.start.train == "batches"
