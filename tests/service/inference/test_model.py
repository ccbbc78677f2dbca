"""Loading: golden cells, and the arithmetic that tasks share."""

import io
import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import scipy.sparse as sp
from onnx import numpy_helper

from service.cells.counts import Cells, csr
from service.contract import artifact
from service.contract.store import Store
from service.errors import GoldenMismatch, InvalidArtifact, ModelNotFound, ModelNotReady
from service.inference.model import Model, load
from service.inference.models import Models
from service.inference.query import prepare
from service.inference.session import N_SMALL, Runtime
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


@pytest.fixture
def stepped(tmp_path: Path) -> Model:
    """The tiny model with an encoder in two steps."""
    return load(artifact.read(write_artifact(tmp_path, has_steps=True)), Runtime(n_threads=2))


def test_encode_in_two_steps(tiny: Model, stepped: Model) -> None:
    """The steps give what the whole gives, and a cell the same bits in any company; zeros that are stored, and no count at all, too."""
    sparse = counts(300)
    sparse.data[:7] = 0
    sparse = sp.vstack([sparse, sp.csr_matrix((1, N_GENES), dtype=np.float32)], format="csr")
    together = stepped.encode(sparse)

    np.testing.assert_allclose(together, tiny.encode(sparse), atol=1e-6)
    alone = np.concatenate([stepped.encode(sparse[cell : cell + 1]) for cell in range(sparse.shape[0])])
    assert alone.tobytes() == together.tobytes()
    assert stepped.encode(sparse[::-1])[::-1].tobytes() == together.tobytes()
    assert stepped.encode(sparse[:0]).shape == (0, 5)


def test_small_and_large_counts_in_two_steps(stepped: Model) -> None:
    """A cell's bits are the same whether its counts are looked up, or computed because a cell beside it has a large one."""
    small = counts(30)
    large = sp.csr_matrix(small * 300.0, dtype=np.float32)
    assert small.max() < N_SMALL < large.max()
    together = stepped.encode(sp.vstack([small, large], format="csr"))
    assert stepped.encode(small).tobytes() == together[:30].tobytes()
    assert stepped.encode(large).tobytes() == together[30:].tobytes()


def test_genes_in_any_order_in_two_steps(stepped: Model) -> None:
    """Genes that come unordered, twice in one cell or as two columns of one gene give the bits of their sums."""
    whole = counts(20)
    names = stepped.genes.table.gene_symbol
    expected = stepped.encode(prepare(stepped, Cells(names, whole)).counts)
    halves = whole.copy()
    halves.data = np.floor(halves.data / 2)
    rest = whole - halves
    order = np.random.default_rng(0).permutation(N_GENES)
    twice = csr(
        np.concatenate([np.r_[halves[i].data, rest[i].data] for i in range(20)]),
        np.concatenate([np.r_[halves[i].indices, rest[i].indices] for i in range(20)]),
        halves.indptr + rest.indptr,
        N_GENES,
    )
    sent = {
        "another order": Cells(tuple(names[gene] for gene in order), csr_of(whole[:, order])),
        "unsorted": Cells(names, csr(*backwards(whole), N_GENES)),
        "twice in a cell": Cells(names, twice),
        "two columns": Cells((*names, *names), csr_of(sp.hstack([halves, rest]))),
    }
    for what, cells in sent.items():
        assert stepped.encode(prepare(stepped, cells).counts).tobytes() == expected.tobytes(), what


def csr_of(matrix: sp.spmatrix) -> sp.csr_matrix:
    return sp.csr_matrix(matrix)


def backwards(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """data, indices and indptr with each cell's genes in falling order."""
    rows = [slice(start, stop) for start, stop in itertools.pairwise(matrix.indptr)]
    return (
        np.concatenate([matrix.data[row][::-1] for row in rows]),
        np.concatenate([matrix.indices[row][::-1] for row in rows]),
        matrix.indptr,
    )


def test_steps_that_are_not_the_encoder(tmp_path: Path) -> None:
    """Two steps that give something else than the whole refuse the version."""
    document, contents = parts(has_steps=True)
    other = parts(has_steps=True, seed=5)[1]
    arrays = dict(np.load(io.BytesIO(contents["golden.npz"])))
    session = ort.InferenceSession(other["encode_values.onnx"], providers=["CPUExecutionProvider"])
    arrays["encode_values/latent"] = session.run(None, {"values": arrays["encode_values/values"]})[0]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    contents |= {"golden.npz": buffer.getvalue(), "encode_values.onnx": other["encode_values.onnx"]}
    document["files"] = {name: file.model_dump() for name, file in artifact.describe(contents).items()}
    path = artifact.write(tmp_path, artifact.Manifest.model_validate(document), contents)
    with pytest.raises(GoldenMismatch, match="encode/latent"):
        load(artifact.read(path), Runtime())


def test_transform_of_zero(tmp_path: Path) -> None:
    """A transform that makes something of nothing cannot be run for the counts alone."""
    document, contents = parts(has_steps=True)
    graph = onnx.load_from_string(contents["transform.onnx"])
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(1, 1.00001, np.float32), "one"))
    contents["transform.onnx"] = graph.SerializeToString()
    document["files"] = {name: file.model_dump() for name, file in artifact.describe(contents).items()}
    path = artifact.write(tmp_path, artifact.Manifest.model_validate(document), contents)
    with pytest.raises(InvalidArtifact, match="of 0, not 0"):
        load(artifact.read(path), Runtime())


@pytest.mark.parametrize("missing", ["transform", "encode_values"])
def test_one_step_of_two(missing: str) -> None:
    """One step says nothing without the other."""
    document, _ = parts(has_steps=True)
    del document["graphs"][missing]
    document["golden"]["tolerance"] = {
        key: value for key, value in document["golden"]["tolerance"].items() if not key.startswith(f"{missing}/")
    }
    with pytest.raises(ValueError, match="and not the other"):
        artifact.Manifest.model_validate(document)


def spoiled(root: Path, tensor: str, change) -> Path:
    """The tiny artifact whose golden `tensor` is changed, with all digests right."""
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
