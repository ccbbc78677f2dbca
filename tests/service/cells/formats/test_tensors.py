"""Tensors of the Open Inference Protocol: what is read is what was sent, and what cannot be is refused before memory is taken."""

import gzip
import json
import struct
import zlib
from typing import Any

import numpy as np
import orjson
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.cells.columns import LabelLists, Labels, Values, Vectors
from service.cells.formats import tensors
from service.cells.formats.encodings import decoded
from service.cells.formats.tensor_cells import cells
from service.errors import BodyTooLarge, InvalidCells, MalformedBody, NoCells, TooManyCells

GENES = ("A", "B", "C")


def body(*inputs: tuple[str, str, Any], is_binary: bool = True, **header: Any) -> tuple[bytes, int | None]:
    """A request of (name, datatype, array or words) and its header's length."""
    entries, pieces = [], []
    for name, datatype, values in inputs:
        array = np.asarray(values)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if is_binary:
            words = (
                [struct.pack("<I", len(word.encode())) + word.encode() for word in values]
                if datatype == "BYTES"
                else ()
            )
            pieces.append(b"".join(words) if datatype == "BYTES" else array.tobytes())
            entry["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            entry["data"] = array.reshape(-1).tolist()
        entries.append(entry)
    text = json.dumps({"inputs": entries, **header}).encode()
    return b"".join([text, *pieces]), len(text) if is_binary else None


def dense(values: Any) -> tuple[str, str, Any]:
    return "counts", "FP32", np.asarray(values, dtype=np.float32)


def read_cells(content: bytes, length: int | None, max_cells: int = 100) -> sp.csr_matrix:
    return cells(tensors.read(content, length).inputs, "tiny", GENES, max_cells).counts


counts = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 8), st.just(3)), elements=st.integers(0, 9).map(lambda number: number * 1.0)
)


@given(counts, st.booleans(), st.text(max_size=9))
def test_dense_counts(values: np.ndarray, is_binary: bool, padding: str) -> None:
    """Dense counts arrive as they were sent, in either form, wherever in the body they lie."""
    content, length = body(dense(values), is_binary=is_binary, id=padding)
    found = read_cells(content, length)

    assert tensors.read(content, length).inputs["counts"].numbers().flags.aligned
    assert found.has_sorted_indices
    np.testing.assert_array_equal(found.toarray(), values)


@given(counts, st.booleans())
def test_sparse_counts(values: np.ndarray, is_binary: bool) -> None:
    """The three arrays of scipy's csr_matrix are the same cells."""
    matrix = sp.csr_matrix(values)
    sent = [
        ("data", "FP32", matrix.data),
        ("indices", "INT64", matrix.indices.astype(np.int64)),
        ("indptr", "INT64", matrix.indptr.astype(np.int64)),
    ]
    np.testing.assert_array_equal(read_cells(*body(*sent, is_binary=is_binary)).toarray(), values)


@pytest.mark.parametrize("is_binary", [True, False])
def test_genes(is_binary: bool) -> None:
    """Genes that the client names are the columns; else they are the model's."""
    names = ["ZÜRICH1", "B"]
    content, length = body(dense([[1, 2]]), ("genes", "BYTES", names), is_binary=is_binary)
    assert cells(tensors.read(content, length).inputs, "tiny", GENES, 9).genes == tuple(names)
    content, length = body(dense([[1, 2, 3]]), is_binary=is_binary)
    assert cells(tensors.read(content, length).inputs, "tiny", GENES, 9).genes == GENES


def test_nested_json() -> None:
    """JSON values may be nested as the shape says."""
    content = json.dumps(
        {"inputs": [{"name": "counts", "datatype": "FP32", "shape": [2, 3], "data": [[1, 0, 2], [0, 3, 0]]}]}
    )
    assert read_cells(content.encode(), None).toarray().tolist() == [[1, 0, 2], [0, 3, 0]]


def test_json_is_not_rounded_to_a_count() -> None:
    """What would be a whole number as float32 is not made one: whether values are counts is decided on what was sent."""
    found = read_cells(*body(("counts", "FP32", np.array([[1 + 1e-12, 0, 2**24 + 1]])), is_binary=False))
    assert found.data.tolist() == [1 + 1e-12, 2**24 + 1]


def tensor(**changes: Any) -> dict[str, Any]:
    entry = {"name": "counts", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3], **changes}
    return {name: value for name, value in entry.items() if value is not None}


def sparse(data: Any = (1.0, 2.0), indices: Any = (0, 2), indptr: Any = (0, 1, 2)) -> list[dict[str, Any]]:
    return [
        tensor(name="data", shape=[len(data)], data=data),
        tensor(name="indices", datatype="INT64", shape=[len(indices)], data=indices),
        tensor(name="indptr", datatype="INT64", shape=[len(indptr)], data=indptr),
    ]


GIB = 2**30
WRONG: list[tuple[list[dict[str, Any]], str]] = [
    ([tensor(name="INPUT0")], "unexpected inference input 'INPUT0' for model 'tiny'"),
    ([tensor(datatype="INT32")], "data-type is 'INT32', but model 'tiny' expects 'FP32'"),
    ([tensor(datatype="INT64")], "data-type is 'INT64', but model 'tiny' expects 'FP32'"),
    ([tensor(shape=[3])], "unexpected shape for input 'counts' for model 'tiny'"),
    ([tensor(shape=[1, 2], data=[1, 2])], r"Expected \[-1, 3\], got \[1, 2\]"),
    ([tensor(shape=[2, 3])], "must have 6 elements, but 3 arrived"),
    ([tensor(data=[1, 2, 3, 4])], "must have 3 elements, but more than that"),
    ([tensor(data=[1, 2, "3"])], "must be numbers"),
    ([tensor(data=[1, 2, True])], "must be numbers"),
    ([tensor(data=[[1, 2], 3])], "must have 3 elements"),
    ([tensor(data=[1, 2, 10**399])], "beyond FP32"),
    ([tensor(shape=[-1, 3])], "shape.1|shape.0"),
    ([tensor(shape=[1.0, 3])], "shape"),
    ([tensor(shape=[1] * 9)], "shape"),
    ([tensor(data=None)], "either 'data' or the parameter"),
    ([tensor(parameters={"binary_data_size": 12})], "either 'data' or the parameter"),
    ([tensor(parameters={"shared_memory_region": "x"})], "shared memory is not used"),
    ([tensor(), tensor()], "sent twice"),
    ([tensor(name="genes", datatype="BYTES", shape=[1], data=["A"])], "expected the input 'counts'"),
    ([tensor(), *sparse()], "expected the input 'counts'"),
    (sparse()[:2], "expected the input 'counts'"),
    ([tensor(), tensor(name="genes", datatype="BYTES", shape=[3], data=["A", "B", 3])], "must be strings"),
    ([tensor(), tensor(name="genes", datatype="BYTES", shape=[3], data=["A", "B", ""])], "printable"),
    ([tensor(), tensor(name="genes", datatype="BYTES", shape=[GIB], data=["A"])], "no genome has more"),
    (sparse(indices=(0, 3)), r"'indices'\[1\] is 3, but there are 3 genes"),
    (sparse(indices=(-1, 2)), r"'indices'\[0\] is -1"),
    (sparse(indices=(0,)), "2 counts, but 'indices' 1"),
    (sparse(indptr=(0, 2, 1, 2)), "'indptr' must rise"),
    (sparse(indptr=(1, 1, 2)), "'indptr' must rise"),
    (sparse(indptr=(0, 1, 3)), "'indptr' must rise"),
    (sparse(indptr=(0, 0.5, 2)), "must be numbers of type INT64"),
    (sparse(indptr=(0, 2**63, 2)), "beyond INT64"),
    ([], "inputs"),
]


@pytest.mark.parametrize(("inputs", "words"), WRONG)
def test_inputs_that_are_none(inputs: list[dict[str, Any]], words: str) -> None:
    """Each is refused with what is wrong and where."""
    with pytest.raises(InvalidCells, match=words):
        read_cells(json.dumps({"inputs": inputs}).encode(), None)


@pytest.mark.parametrize(
    "shape", [[10**15, 3], [2**62, 2**62], [50, 10**12], [2**63 - 1, 1], [0, 10**18], [10**30, 3]], ids=str
)
def test_huge_shapes(shape: list[int]) -> None:
    """A shape that is not backed by bytes takes no memory."""
    text = json.dumps(
        {"inputs": [{"name": "counts", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": 12}}]}
    ).encode()
    with pytest.raises((InvalidCells, TooManyCells, NoCells)):
        read_cells(text + bytes(12), len(text))


def test_numbers_of_cells() -> None:
    """More cells than are allowed, and none."""
    with pytest.raises(TooManyCells):
        read_cells(*body(dense(np.ones((11, 3)))), max_cells=10)
    with pytest.raises(NoCells):
        read_cells(*body(dense(np.ones((0, 3)))))
    with pytest.raises(NoCells):
        read_cells(json.dumps({"inputs": sparse((), (), (0,))}).encode(), None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content, length: (content[:-1], length), "11 bytes are left"),
        (lambda content, length: (content + b"x", length), "1 bytes after the last input"),
        (lambda content, length: (content, length - 1), "cannot be read"),
        (lambda content, length: (content, len(content) + 1), "Inference-Header-Content-Length is"),
        (lambda content, length: (content, 0), "without a JSON header"),
        (lambda content, length: (content, None), "cannot be read"),
        (lambda content, length: (content[:length], None), "0 bytes are left"),
        (
            lambda content, length: (content.replace(b": 12}", b": -1}"), length),
            "binary_data_size of input 'counts' is -1",
        ),
        (
            lambda content, length: (content.replace(b": 12}", b':"a"}'), length),
            "binary_data_size of input 'counts' is a",
        ),
    ],
)
def test_bytes_that_do_not_fit(change: Any, words: str) -> None:
    """Bytes that are missing, left over or not where the header says are never taken for cells."""
    with pytest.raises(MalformedBody, match=words):
        read_cells(*change(*body(dense([[1, 2, 3]]))))


def test_wrong_size_of_a_tensor() -> None:
    """As many bytes as declared, but not as many as the shape needs."""
    content, length = body(dense([[1, 2, 3]]))
    with pytest.raises(InvalidCells, match=r"shape \[2, 3\] must have 24 bytes, but 12 arrived"):
        read_cells(content.replace(b"[1, 3]", b"[2, 3]"), length)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x01\0\0\0A\xff\xff\xff\xff", "Element 1 of input 'genes' ends beyond"),
        (b"\x01\0\0\0A\x01\0", "Element 1 of input 'genes' ends beyond"),
        (b"\x01\0\0\0\xff\x01\0\0\0B", "is not UTF-8"),
        (b"\x01\0\0\0A", "must have 2 elements, but 1 arrived"),
        (b"\x01\0\0\0A\x01\0\0\0B\x01\0\0\0C", "more than that"),
        (bytes(4) * 10**6, "more than that"),
    ],
)
def test_words_that_are_none(content: bytes, words: str) -> None:
    """BYTES that do not hold the declared words."""
    with pytest.raises(InvalidCells, match=words):
        tensors.Tensor("genes", "BYTES", (2,), memoryview(content)).words()


def test_answers() -> None:
    """What is written is JSON or bytes as asked, and the header says where they lie."""
    latent = np.array([[0.1, -2], [3e-9, 4]], dtype=np.float32)
    columns = [
        ("latent", Vectors(latent), True),
        ("label", Labels(np.array([1, 0], np.int32), ("B", "Tβ")), True),
        ("is_empty", Values(np.array([True, False])), True),
        ("score", Values(latent[:, 0]), False),
    ]
    content, length = tensors.write({"model_name": "tiny"}, columns)
    assert length is not None
    header, rest = orjson.loads(content[:length]), content[length:]
    sizes = [output["parameters"]["binary_data_size"] for output in header["outputs"][:3]]

    assert (header["model_name"], sizes) == ("tiny", [16, 4 + 3 + 4 + 1, 2])
    assert rest == latent.tobytes() + b"\x03\0\0\0T\xce\xb2\x01\0\0\0B" + b"\x01\0"
    assert [output["datatype"] for output in header["outputs"]] == ["FP32", "BYTES", "BOOL", "FP32"]
    assert [output["shape"] for output in header["outputs"]] == [[2, 2], [2], [2], [2]]
    assert np.array(header["outputs"][3]["data"], np.float32).tobytes() == np.ascontiguousarray(latent[:, 0]).tobytes()
    plain, no_length = tensors.write({}, [(name, column, False) for name, column, _ in columns])
    assert no_length is None
    assert [output["data"] for output in json.loads(plain)["outputs"][1:3]] == [["Tβ", "B"], [True, False]]


def test_answers_of_several_words() -> None:
    """The words of a cell stand one after the other, as the shape says."""
    column = LabelLists(np.array([[2, 0], [0, 0]], np.int32), ("B", "nobody's", "Tβ"))
    plain, _ = tensors.write({}, [("near", column, False)])
    assert json.loads(plain)["outputs"][0] == {
        "name": "near",
        "datatype": "BYTES",
        "shape": [2, 2],
        "data": ["Tβ", "B", "B", "B"],
    }
    content, length = tensors.write({}, [("near", column, True)])
    assert content[length:] == b"\x03\0\0\0T\xce\xb2" + b"\x01\0\0\0B" * 3


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_encodings(encoding: str, encode: Any) -> None:
    """Compressed bodies are read; a bomb, a cut and a tail are not."""
    content = bytes(1000)
    assert decoded(encode(content), encoding, 1000) == content
    assert decoded(content, "identity", 10) == content
    with pytest.raises(BodyTooLarge):
        decoded(encode(bytes(10**7)), encoding, 1000)
    for damaged in (encode(content)[:-1], encode(content) + b"x", b"x" + encode(content)):
        with pytest.raises(MalformedBody):
            decoded(damaged, encoding, 1000)
