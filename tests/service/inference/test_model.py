"""Loading: golden cells, and the arithmetic that tasks share."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from service.contract import artifact
from service.contract.store import Store
from service.errors import GoldenMismatch, ModelNotFound, ModelNotReady
from service.inference.model import Model, load
from service.inference.models import Models
from service.inference.session import Runtime
from tests.builders import N_GENES, counts, graphs, parts, write_artifact


def test_encode(tiny: Model) -> None:
    """Sparse counts give the latent of their dense form; no cell gives none."""
    sparse = counts(300)
    direct = tiny.sessions["encode"].run({"counts": sparse.toarray()})["latent"]

    assert tiny.encode(sparse).tobytes() == direct.tobytes()
    assert tiny.encode(sparse[:0]).shape == (0, 5)


def test_decode_average(tiny: Model) -> None:
    """The average over batches is the mean of the batches' expressions, and the default of the manifest."""
    latent, library = tiny.encode(counts(4)), np.full(4, 100, np.float32)
    one, two = (tiny.decode(latent, library, batch) for batch in ("one", "two"))

    np.testing.assert_allclose(tiny.decode(latent, library), (one + two) / 2, rtol=1e-6)
    assert not np.allclose(one, two)
    np.testing.assert_allclose(one.sum(axis=1), 100, rtol=1e-5)


def test_classify(tiny: Model) -> None:
    """Probabilities are those of the graph."""
    latent = tiny.encode(counts(4))
    expected = ort.InferenceSession(graphs()["classify"], providers=["CPUExecutionProvider"]).run(
        None, {"latent": latent}
    )[0]

    np.testing.assert_allclose(tiny.classify(counts(4))["cell_type"], expected, atol=1e-7)


def spoiled(root: Path, tensor: str, change) -> Path:
    """The tiny artifact whose golden `tensor` is changed, with all digests right."""
    import io

    document, contents = parts()
    arrays = dict(np.load(io.BytesIO(contents["golden.npz"])))
    arrays[tensor] = change(arrays[tensor])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    contents["golden.npz"] = buffer.getvalue()
    document["files"] = {name: file.model_dump() for name, file in artifact.describe(contents).items()}
    return artifact.write(root, artifact.Manifest.model_validate(document), contents)


@pytest.mark.parametrize("tensor", ["encode/latent", "decode/expression", "classify/probabilities_cell_type"])
def test_golden_cells_that_differ(tmp_path: Path, tensor: str) -> None:
    """A difference beyond the tolerance in any output of any graph refuses the version, with both numbers."""
    path = spoiled(tmp_path, tensor, lambda values: values + 1e-3)
    with pytest.raises(GoldenMismatch, match=tensor) as refused:
        load(artifact.read(path), Runtime())

    assert refused.value.difference == pytest.approx(1e-3, rel=1e-2)
    assert refused.value.tolerance == 1e-4


def test_golden_cells_within_the_tolerance(tmp_path: Path) -> None:
    """Another machine's last bits are no reason to refuse."""
    load(artifact.read(spoiled(tmp_path, "encode/latent", lambda values: values + 1e-6)), Runtime())


def test_golden_cells_that_are_not_numbers(tmp_path: Path) -> None:
    """NaN is not within any tolerance."""
    with pytest.raises(GoldenMismatch):
        load(artifact.read(spoiled(tmp_path, "encode/latent", lambda values: values * np.nan)), Runtime())


class TestModels:
    """The models of a process."""

    def test_states(self, tmp_path: Path) -> None:
        """Good versions answer, broken ones say why, and the name means the alias `default`."""
        for version in ("1", "2", "3"):
            write_artifact(tmp_path, version=version, seed=int(version))
        store = Store(tmp_path)
        store.set_alias(store.resolve("tiny@2"))
        (tmp_path / "tiny/3/genes.tsv").write_bytes(b"broken")
        models = Models(store=store, runtime=Runtime())

        assert "loaded" in str(models.problem())
        with pytest.raises(ModelNotReady):
            models.get("tiny")
        models.load_all()
        assert models.problem() is None
        assert models.get("tiny").id == models.get(None).id == models.get("tiny@default").id == "tiny@2"
        assert models.get("tiny@1").id == "tiny@1"
        assert models.states()["tiny@1"] == "ready"
        assert "genes.tsv" in models.states()["tiny@3"]
        with pytest.raises(ModelNotReady, match=r"genes\.tsv"):
            models.get("tiny@3")
        with pytest.raises(ModelNotFound, match="tiny@1, tiny@2, tiny@3"):
            models.get("tiny@9")

    def test_an_unreadable_alias_file(self, tmp_path: Path) -> None:
        """An aliases.json that is not one is the store's problem, and said."""
        write_artifact(tmp_path)
        (tmp_path / "tiny/aliases.json").write_text('{"default": "7"}')
        models = Models(store=Store(tmp_path), runtime=Runtime())
        models.load_all()

        assert "which is no version" in str(models.problem())


def test_n_genes(tiny: Model) -> None:
    """The gene index and the graph agree."""
    assert len(tiny.genes.table) == tiny.manifest.genes.n_genes == N_GENES
