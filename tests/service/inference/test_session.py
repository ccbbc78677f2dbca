"""Sessions: signatures, fixed shapes, threads and providers."""

import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.contract.manifest import Graph
from service.contract.onnx_file import operators
from service.errors import InvalidArtifact, ProviderUnavailable, UnstableBits
from service.inference import session as module
from service.inference.session import SHAPES, Runtime, Session, _quota, choose_runtime, usable_cpus
from tests.builders import N_GENES, counts, graphs, parts


def signature(graph: str) -> Graph:
    return Graph.model_validate(parts()[0]["graphs"][graph])


@pytest.fixture(scope="module")
def encode() -> Session:
    return Session(graphs()["encode"], signature("encode"), Runtime(), "encode.onnx")


@pytest.mark.parametrize("n_cells", [1, 2, 15, 16, 17, 64, 65, 128, 600])
def test_any_number_of_rows(encode: Session, n_cells: int) -> None:
    """Padding and splitting leave no trace: each row is as ONNX Runtime gives it for all rows at once."""
    dense = counts(n_cells).toarray()
    expected = ort.InferenceSession(graphs()["encode"], providers=["CPUExecutionProvider"]).run(
        None, {"counts": dense}
    )[0]
    latent = encode.run({"counts": dense})["latent"]

    assert latent.shape == (n_cells, 5)
    # 1e-6: float32 sums of 40 terms may be added up in another order for another shape.
    np.testing.assert_allclose(latent, expected, atol=1e-6)


class OnesWithAMood(ort.InferenceSession):
    """A runtime whose answer depends on the number of rows, or on the place of a row, as nothing forbids."""

    def __init__(self, odd_shapes: tuple[int, ...] = (), odd_places: dict[int, int] | None = None) -> None:
        self._odd_shapes = odd_shapes
        self._odd_places = odd_places or {}

    def run(self, outputs, inputs):
        n_rows = len(inputs["counts"])
        latent = np.ones((n_rows, 5), np.float32) + np.float32(1e-6 if n_rows in self._odd_shapes else 0)
        # One bit of one cell in one place, for cells that have a count in their second gene.
        if n_rows in self._odd_places and inputs["counts"][self._odd_places[n_rows], 1] > 0:
            latent[self._odd_places[n_rows], 2] += np.float32(2e-7)
        return [latent]


@pytest.fixture
def moody(encode: Session, monkeypatch: pytest.MonkeyPatch):
    """A session over a runtime with a mood."""

    def moody(**mood) -> Session:
        monkeypatch.setattr(encode, "_session", OnesWithAMood(**mood))
        monkeypatch.setattr(encode, "shapes", SHAPES)
        return encode

    return moody


@pytest.mark.parametrize(("odd_shapes", "kept"), [((), (16, 64)), ((16,), (64,)), ((64,), (64,)), ((16, 64), (16, 64))])
def test_shapes_with_other_bits_are_not_used(moody, odd_shapes: tuple[int, ...], kept: tuple[int, ...]) -> None:
    """A shape that gives the golden cells other bits than the largest is dropped."""
    session = moody(odd_shapes=odd_shapes)
    session.prove_shapes({"counts": counts(5).toarray()})

    assert session.shapes == kept


@pytest.mark.parametrize(("place", "shape"), [(0, 64), (37, 64), (63, 64), (15, 16)])
def test_one_bit_of_one_cell_in_one_place(moody, place: int, shape: int) -> None:
    """A shape in which a single place changes a single bit of a single cell is found and dropped."""
    golden = np.zeros((7, N_GENES), np.float32)
    golden[3, 1] = 1
    session = moody(odd_places={shape: place})
    session.prove_shapes({"counts": golden})

    assert session.shapes == tuple(other for other in SHAPES if other != shape)


def test_no_stable_shape(moody) -> None:
    """Where every shape depends on the place, the graph is not served."""
    with pytest.raises(UnstableBits, match=r"encode\.onnx"):
        moody(odd_places={16: 3, 64: 9}).prove_shapes({"counts": np.eye(5, N_GENES, 1, dtype=np.float32)})


def test_another_signature_is_refused() -> None:
    """A graph whose inputs are not those of the manifest is refused with what it has."""
    with pytest.raises(InvalidArtifact, match=r"its inputs are counts tensor\(float\)"):
        Session(graphs(n_genes=N_GENES + 1)["encode"], signature("encode"), Runtime(), "encode.onnx")
    with pytest.raises(InvalidArtifact, match="its inputs are latent"):
        Session(graphs()["classify"], signature("encode"), Runtime(), "encode.onnx")


def test_bytes_that_are_no_graph() -> None:
    """What ONNX Runtime cannot read is an invalid artifact, with its reason."""
    with pytest.raises(InvalidArtifact, match="ONNX Runtime refuses it"):
        Session(b"nonsense", signature("encode"), Runtime(), "encode.onnx")


def test_a_provider_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA, asking for it is an error, and a fallback only where it is allowed."""
    monkeypatch.setattr(module, "_cuda_obstacle", lambda: "the reason")
    with pytest.raises(ProviderUnavailable, match=r"the reason.*CELLSERVE_ALLOW_PROVIDER_FALLBACK"):
        choose_runtime("cuda", 3, allow_fallback=False)

    assert choose_runtime("cuda", 3, allow_fallback=True) == Runtime("cpu", 3)


def test_threads_are_the_cpus_that_may_be_used() -> None:
    """By default as many threads as usable CPUs; a setting wins."""
    assert choose_runtime("cpu", None, allow_fallback=False).n_threads == usable_cpus() >= 1
    assert choose_runtime("cpu", 7, allow_fallback=False).n_threads == 7


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "20000 100000\n"}, 1.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
        ({}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], cpus: float | None) -> None:
    """Control groups of version 2 and 1 are understood; a quota below one CPU counts as one."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    assert _quota(tmp_path) == cpus


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_work_is_shared_in_order(n_threads: int) -> None:
    """Each item once, the answers in the items' order, by no more threads than there are, the caller among them."""
    threads = set()

    def work(item: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.002)
        return item * item

    assert Runtime(n_threads=n_threads).share(work, range(20)) == [item * item for item in range(20)]
    assert threading.get_ident() in threads
    assert len(threads) == n_threads


def test_an_error_of_any_thread_is_the_callers() -> None:
    """And no helper works on when it is raised."""
    working = 0

    def work(item: int) -> None:
        nonlocal working
        working += 1
        time.sleep(0.005)
        working -= 1
        if item == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        Runtime(n_threads=3).share(work, range(9))
    assert working == 0


@pytest.mark.parametrize(("operator", "shapes"), [("Relu", (4, 16, 64)), ("Exp", (16, 64))])
def test_few_rows_where_the_end_of_a_buffer_is_nothing_special(operator: str, shapes: tuple[int, ...]) -> None:
    """A graph that rounds each number as IEEE 754 says may run with 4 rows; one of the others, whose last numbers may differ, never does."""
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.standard_normal((N_GENES, 5)).astype(np.float32), "w")
    nodes = [helper.make_node("Gemm", ["counts", "w"], ["sum"]), helper.make_node(operator, ["sum"], ["latent"])]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", n])
        for name, n in (("counts", N_GENES), ("latent", 5))
    ]
    graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], [weight])
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    session = Session(content, signature("encode"), Runtime(), "encode.onnx")
    assert session.shapes == shapes
    assert operators(content) == {"Gemm", operator}

    rows = random.random((70, N_GENES), np.float32)
    session.prove_shapes({"counts": rows[:8]})
    whole = session.run({"counts": rows})["latent"]
    for n in (1, 3, 4, 5, 17):
        np.testing.assert_array_equal(
            session.run({"counts": rows[:n]})["latent"].view(np.int32), whole[:n].view(np.int32)
        )
