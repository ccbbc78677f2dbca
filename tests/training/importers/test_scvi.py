"""Imported SCVI and SCANVI: scvi-tools' own numbers, through the unchanged service; what cannot be served is refused by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from service.contract import artifact
from service.inference import model as serving
from service.inference.session import Runtime
from training.importers.restricted_pickle import UnsafePickle
from training.importers.scvi_artifact import BatchNeeded, Import, import_scvi
from training.importers.scvi_file import NotAnScviModel, UnsupportedOption, read_scvi

ASKED = {
    "covariates": {"batch": "plate1", "covariates": {"donor": "donor1"}},
    "first_layer_only": {"batch": "average"},
    "embedding": {"batch": "average"},
}
"""What has to be said of models whose networks take more than counts."""

SERVED = ("default", "covariates", "first_layer_only", "embedding", "one_batch", "raw_input", "scanvi", "scanvi_linear")


def load(path: Path) -> serving.Model:
    return serving.load(artifact.read(path), Runtime())


@pytest.mark.parametrize("name", SERVED)
def test_scvi_tools_gives_the_same_numbers(name: str, saved_models: Path, scvi_python: Path, tmp_path: Path) -> None:
    """Latent, expected counts and probabilities, by scvi-tools in a process of its own; the figures stand in manifest and card."""
    wanted = Import(name="imported", species="none", scvi_python=scvi_python, **ASKED.get(name, {}))
    model = load(import_scvi(saved_models / name, wanted, tmp_path))
    outputs = {"latent", "expression", *(["probabilities"] if name.startswith("scanvi") else [])}
    assert {f"scvi_tools_{output}_difference" for output in outputs} == set(model.manifest.metrics)
    assert max(model.manifest.metrics.values()) < 1e-4
    assert "Largest differences from scvi-tools itself" in model.card
    assert model.manifest.batch.encoder_batch == ASKED.get(name, {}).get("batch")


def test_labels_are_those_of_scvi_tools(saved_models: Path, tmp_path: Path) -> None:
    """In its order, without the unlabelled category; training cells are told apart through the service."""
    model = load(import_scvi(saved_models / "scanvi", Import(name="imported", species="none"), tmp_path))
    assert model.manifest.labels[0].classes == ("B", "NK", "T")
    probabilities = model.classify(sp.csr_matrix(np.eye(40, dtype=np.float32)))["cell_type"]
    assert probabilities.shape == (40, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_the_batch_of_a_new_cell_changes_what_it_becomes(saved_models: Path, tmp_path: Path) -> None:
    """Where the encoder takes the batch; the manifest says which was taken."""
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (5, 40)).astype(np.float32))
    latents = {}
    for i, batch in enumerate(("plate0", "plate2", "average")):
        wanted = Import(name="imported", species="none", batch=batch)
        model = load(import_scvi(saved_models / "first_layer_only", wanted, tmp_path, str(i)))
        assert model.manifest.batch.encoder_batch == batch
        assert model.manifest.provenance.config["encoder_batch"] == batch
        latents[batch] = model.encode(counts)
    assert len({latent.tobytes() for latent in latents.values()}) == 3


def test_a_model_that_takes_the_batch_is_refused_without_one(saved_models: Path, tmp_path: Path) -> None:
    """With the batches that there are; and so is one that does not exist, or a covariate."""
    folder = saved_models / "covariates"
    for wanted, message in (
        ({}, r"'batch': plate0, plate1, plate2.*'donor' \(donor0, donor1\).*--batch average"),
        ({"batch": "plate7"}, "no batch 'plate7'"),
        ({"batch": "average", "covariates": {"donor": "donor7"}}, "donor=donor7.*donor: donor0, donor1"),
        ({"batch": "average", "covariates": {"sex": "f"}}, "sex=f"),
    ):
        with pytest.raises(BatchNeeded, match=message):
            import_scvi(folder, Import(name="imported", species="none", **wanted), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("library_encoder", "use_observed_lib_size=False"),
        ("logistic_normal", "latent_distribution='ln'"),
        ("normal", "gene_likelihood='normal'"),
        ("size_factor", "size_factor_key='size'"),
        ("continuous", r"continuous_covariate_keys=\['size'\]"),
    ],
)
def test_unsupported_options_are_named(name: str, option: str, saved_models: Path) -> None:
    """Before anything is built."""
    with pytest.raises(UnsupportedOption, match=option):
        read_scvi(saved_models / name)


def test_real_cells_may_be_compared_with(saved_models: Path, tmp_path: Path) -> None:
    """Those that were saved with the model, matched by gene name."""
    folder = saved_models / "scanvi"
    model = load(import_scvi(folder, Import(name="imported", species="none", cells=folder / "adata.h5ad"), tmp_path))
    assert model.manifest.parity.n_cells == 161


def test_int8_is_another_model(saved_models: Path, tmp_path: Path) -> None:
    """Its name says so, its answers are near those in float32 and not the same."""
    folder = saved_models / "scanvi"
    wanted = Import(name="imported", species="none", cells=folder / "adata.h5ad")
    exact, rounded = (
        load(import_scvi(folder, replace(wanted, precision=precision), tmp_path)) for precision in ("float32", "int8")
    )
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (64, 40)).astype(np.float32))
    latent, expected = rounded.encode(counts), exact.encode(counts)

    assert rounded.id == "imported-int8@1"
    assert {graph for graph, of in rounded.manifest.graphs.items() if of.precision == "int8"} == {
        "encode",
        "encode_values",
    }
    assert not np.array_equal(latent, expected)
    assert np.corrcoef(latent.ravel(), expected.ravel())[0, 1] > 0.99
    assert "in 8 bits" in rounded.card
    assert "in 8 bits" not in exact.card


def test_published_models(published_model: Path, scvi_python: Path, tmp_path: Path) -> None:
    """Saved by scvi-tools 0.15.0 and by one from before 1.1; today's scvi-tools gives the same numbers."""
    wanted = Import(name="imported", species="none", scvi_python=scvi_python)
    model = load(import_scvi(published_model, wanted, tmp_path))
    assert max(model.manifest.metrics.values()) < 1e-4
    assert bool(model.manifest.labels) == (published_model.name == "scanvi_pre_1.1")


def test_published_models_need_no_scvi_tools(published_model: Path, tmp_path: Path) -> None:
    """Neither to be read nor to be served."""
    model = load(import_scvi(published_model, Import(name="imported", species="none"), tmp_path))
    assert model.manifest.provenance.config["imported_from"].startswith(("scvi-tools 0.15", "scvi-tools 1.0"))
    assert "scvi-tools was not asked" in model.card


def test_what_is_no_model(tmp_path: Path) -> None:
    """An empty folder, another model, one that is too old, and one that would run."""
    with pytest.raises(NotAnScviModel, match="it holds"):
        read_scvi(tmp_path)
    (tmp_path / "model_params.pt").write_bytes(b"")
    with pytest.raises(NotAnScviModel, match=r"before 0\.15"):
        read_scvi(tmp_path)
    file = tmp_path / "model.pt"
    (tmp_path / "model_params.pt").unlink()
    torch.save({"state_dict": {}}, file)
    with pytest.raises(NotAnScviModel, match="lacks model_state_dict"):
        read_scvi(tmp_path)
    document = {"model_state_dict": {}, "var_names": [], "attr_dict": {"registry_": {"model_name": "TOTALVI"}}}
    torch.save(document, file)
    with pytest.raises(NotAnScviModel, match="holds a TOTALVI"):
        read_scvi(tmp_path)
    document["attr_dict"] = {}
    torch.save(document, file)
    with pytest.raises(NotAnScviModel, match="no registry_"):
        read_scvi(tmp_path)
    torch.save({"model_state_dict": torch.nn.Linear(1, 1)}, file)
    with pytest.raises(UnsafePickle, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_scvi(tmp_path)
