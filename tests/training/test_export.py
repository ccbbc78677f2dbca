"""Exporting: the code that serves gives torch's numbers, the bytes repeat, and a failure leaves nothing behind."""

import io
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from service.contract import artifact
from service.contract.store import Store
from service.errors import VersionExists
from service.inference import model as serving
from service.inference.session import Runtime
from tests.training.families.test_families import build
from tests.training.tiny import tiny_config
from training import export as exporting
from training import parity, run
from training.manifest import golden_inputs
from training.onnx_graph import OPSET
from training.quantise import NothingToQuantise, quantise
from training.sparse_input import serving_graphs

FamilyRun = tuple[run.Run, Path]
WITH_SPREAD = ("atlas_vae", "gmvae", "vae")
"""Families whose likelihood is one of counts unless another is asked for."""


def test_what_is_served_is_what_was_trained(family_run: FamilyRun, exported: Path) -> None:
    """Through the serving code, latent within 1e-4, probabilities within 1e-5 and expression within 1e-4 of its largest value."""
    made = family_run[0]
    model = serving.load(artifact.read(exported), Runtime())
    cells = made.test_cells
    library = np.asarray(cells.X.sum(axis=1), dtype=np.float32).ravel()
    batch = np.zeros(cells.n_obs, dtype=np.int64)
    torch_says = parity.run_torch(
        made.family.graphs(), {"counts": cells.X.toarray(), "library": library, "batch": batch}
    )
    latent = model.encode(cells.X)
    np.testing.assert_allclose(latent, torch_says["encode/latent"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        model.classify(cells.X)["cell_type"], torch_says["classify/probabilities_cell_type"], rtol=0, atol=1e-5
    )
    expression = model.decode(latent, library, batch="tiny_a")
    expected = torch_says["decode/expression"]
    np.testing.assert_allclose(expression, expected, rtol=0, atol=1e-4 * expected.max())


def test_an_empty_cell_gives_finite_numbers(exported: Path) -> None:
    """The last golden cell has no counts, and every output of it is finite."""
    golden = artifact.read(exported).golden()
    assert golden["encode/counts"][-1].sum() == 0
    assert all(np.isfinite(array).all() for array in golden.values())


def test_training_twice_gives_the_same_bytes(family_run: FamilyRun, exported: Path, tmp_path: Path) -> None:
    """Not only the graphs: genes, golden cells and reference cells too."""
    again = run.fit(family_run[0].config, tmp_path / "run", show_progress=False)
    path = exporting.export(again, tmp_path / "store")
    names = [
        str(file.relative_to(exported))
        for file in exported.rglob("*.*")
        if file.suffix in (".onnx", ".npz", ".npy", ".tsv")
    ]
    assert {"encode.onnx", "decode.onnx", "classify.onnx", "explain.onnx", "genes.tsv", "golden.npz"} <= set(names)
    assert {"reference/cells.tsv", "reference/latent.npy", "reference/impact.npz"} <= set(names)
    assert [(path / name).read_bytes() for name in names] == [(exported / name).read_bytes() for name in names]


def test_graphs_say_nothing_of_this_machine(exported: Path) -> None:
    """No path, no host, no version of the exporter; one opset; only the number of cells is free."""
    root = str(Path(__file__).parents[2]).encode()
    for path in exported.glob("*.onnx"):
        content = path.read_bytes()
        assert root not in content
        assert not re.search(rb"site-packages|\.py\b|pytorch", content)
        model = onnx.load_from_string(content)
        assert [opset.version for opset in model.opset_import] == [OPSET]
        for value in (*model.graph.input, *model.graph.output):
            axes = value.type.tensor_type.shape.dim
            assert axes[0].dim_param == "n"
            assert all(axis.dim_value > 0 for axis in axes[1:])


def test_an_export_outside_the_tolerance_leaves_nothing(
    tiny_run: run.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output, the difference and the tolerance are named."""
    monkeypatch.setitem(parity.ABSOLUTE, "latent", 1e-12)
    with pytest.raises(parity.OutsideTolerance, match=r"encode/latent differs by .* 1e-12 is allowed"):
        exporting.export(tiny_run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_is_outside_every_tolerance() -> None:
    """A comparison with NaN is false, and must not pass."""
    with pytest.raises(parity.OutsideTolerance):
        parity.compare({"encode/latent": np.full((1, 1), np.nan)}, {"encode/latent": np.zeros((1, 1))})


def test_a_version_too_large_is_refused(tiny_run: run.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    monkeypatch.setattr(exporting, "MAX_BYTES", 1000)
    with pytest.raises(exporting.ArtifactTooLarge, match="1,000 are allowed"):
        exporting.export(tiny_run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_versions_count_up_and_the_first_is_the_default(tiny_run: run.Run, tmp_path: Path) -> None:
    """Without a version the next integer is taken; only an alias that is asked for moves; a version is never replaced."""
    store = Store(tmp_path)
    assert [exporting.export(tiny_run, tmp_path).name for _ in range(2)] == ["1", "2"]
    assert store.aliases("tiny") == {"default": "1"}
    exporting.export(tiny_run, tmp_path, version="ten", alias="default")
    assert store.aliases("tiny") == {"default": "ten"}
    with pytest.raises(VersionExists):
        exporting.export(tiny_run, tmp_path, version="2")


def test_the_manifest_says_where_the_model_comes_from(exported: Path, family_run: FamilyRun) -> None:
    """Seed, commit, packages, parity of every output, and figures of this very model."""
    manifest = artifact.read_manifest(exported)
    assert manifest.provenance.seed == 0
    assert set(manifest.provenance.packages) >= {"torch", "onnxruntime", "python"}
    assert manifest.provenance.config == family_run[0].config.model_dump(mode="json")
    expected = {"encode/latent", "decode/expression", "classify/probabilities_cell_type"}
    expected |= {"explain/attribution", "explain/value", "transform/value", "encode_values/latent"}
    expected |= {f"decode/{modality.name}" for modality in manifest.modalities}
    if family_run[0].config.family in WITH_SPREAD:
        expected |= {"decode/expression_variance"}
    expected |= {f"classify/probabilities_{level}" for level in family_run[0].family.own_levels}
    assert set(manifest.parity.outputs) == expected
    assert set(manifest.metrics) >= {"accuracy_held_out_tiny_a", "macro_f1_held_out_tiny_b"}
    card = artifact.read(exported).card
    assert card.startswith("# tiny@1")
    assert "CL:0000236" in card
    assert "Served against trained" in card


def test_golden_cells_are_held_out(exported: Path, family_run: FamilyRun) -> None:
    """None of them was trained on."""
    made = family_run[0]
    with np.load(io.BytesIO((exported / "golden.npz").read_bytes()), allow_pickle=False) as arrays:
        golden = arrays["encode/counts"][:-1]
    trained_on = {row.tobytes() for row in made.prepared.train.counts.toarray()}
    assert len(golden) == 4
    assert not any(row.tobytes() in trained_on for row in golden)


def test_a_run_that_met_all_its_cells_is_exported(whole_run: FamilyRun, tmp_path: Path) -> None:
    """Runtimes are compared on training cells, as the card says; of cells that were held out nothing is said."""
    made = whole_run[0]
    model = serving.load(artifact.read(exporting.export(made, tmp_path)), Runtime())
    assert model.manifest.parity.n_cells == made.config.export.n_parity
    assert "over 24 training cells" in model.card
    for heading in ("## Held-out cells", "## Missing genes", "the nearest 5 vote"):
        assert heading not in model.card
    assert (model.manifest.missing_genes, model.manifest.reference.vote) == (None, None)
    assert model.classify(made.reference[:3, made.prepared.var.index].X)["cell_type"].shape == (3, 3)


def test_a_model_without_labels_is_exported_without_classify(tiny_sets: None, tmp_path: Path) -> None:
    """Graphs that a model lacks are left out; nothing else changes."""
    made = run.fit(tiny_config(labels=[]), tmp_path / "run", show_progress=False)
    manifest = artifact.read_manifest(exporting.export(made, tmp_path / "store"))
    assert set(manifest.graphs) == {"encode", "decode", "explain", "transform", "encode_values"}
    assert manifest.labels == ()
    assert manifest.metrics == {}


def test_tolerances_are_those_promised() -> None:
    """README and docs promise these."""
    assert parity.ABSOLUTE == {"latent": 1e-4, "probabilities": 1e-5}
    assert parity.tolerance("decode/expression", np.array([200.0])) == pytest.approx(0.02)


def test_torch_reference_is_float64(family_run: FamilyRun) -> None:
    """The network that was trained is compared in float64 and stays float32 itself."""
    made = family_run[0]
    inputs = golden_inputs(made)
    assert all(array.dtype == np.float64 for array in parity.run_torch(made.family.graphs(), inputs).values())
    assert all(parameter.dtype == torch.float32 for parameter in made.family.parameters())


def test_an_encoder_that_takes_logarithms_is_served_in_two_steps(family_run: FamilyRun, exported: Path) -> None:
    """All families here do; the steps are proved when a model is loaded."""
    assert {"transform", "encode_values"} <= set(artifact.read_manifest(exported).graphs)


def test_an_encoder_that_sees_the_library_is_not_cut() -> None:
    """What it sees behind the transform would be lost."""
    atlas = build("atlas_vae", encode_library=True)
    assert "encode_values" not in serving_graphs(atlas)
    assert "encode_values" in serving_graphs(build("atlas_vae"))


def test_int8_is_another_model(family_run: FamilyRun, exported: Path, tmp_path: Path) -> None:
    """Its name says so, its answers are near those in float32 and not the same, and a cell has one answer in any company."""
    path = exporting.export(family_run[0], tmp_path, precision="int8")
    model, exact = (serving.load(artifact.read(found), Runtime()) for found in (path, exported))
    cells = family_run[0].test_cells.X
    latent, expected = model.encode(cells), exact.encode(cells)

    assert model.id == "tiny-int8@1"
    assert {name: graph.precision for name, graph in model.manifest.graphs.items()} == {
        name: "int8" if name.startswith("encode") else "float32" for name in exact.manifest.graphs
    }
    assert not np.array_equal(latent, expected)
    assert np.abs(latent - expected).max() <= model.manifest.parity.outputs["encode/latent"].tolerance
    assert np.corrcoef(latent.ravel(), expected.ravel())[0, 1] > 0.99
    alone = np.concatenate([model.encode(cells[cell : cell + 1]) for cell in range(cells.shape[0])])
    assert alone.tobytes() == latent.tobytes()
    assert "in 8 bits" in (path / "README.md").read_text()
    assert (path / "encode.onnx").stat().st_size < (exported / "encode.onnx").stat().st_size


def test_nothing_to_quantise(exported: Path) -> None:
    """A graph without weights is refused by name of the reason."""
    with pytest.raises(NothingToQuantise, match="no matrix of weights"):
        quantise((exported / "transform.onnx").read_bytes(), {"count": np.ones(8, np.float32)})
