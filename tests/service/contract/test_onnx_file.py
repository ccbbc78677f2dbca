"""What an ONNX file asks for: the reader of its bytes sees at least what ONNX Runtime's parser sees."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from service.contract import onnx_file
from service.errors import InvalidArtifact
from tests import builders

PATH = Path("g.onnx")
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
NODE = helper.make_node("Identity", ["x"], ["y"])


def model(*nodes: onnx.NodeProto, **graph: Any) -> onnx.ModelProto:
    """A model of these nodes, from x to y."""
    return helper.make_model(
        helper.make_graph(list(nodes), "g", [X], [Y], **graph),
        opset_imports=[helper.make_opsetid("", builders.OPSET)],
        ir_version=9,
    )


def refusal(content: bytes) -> str:
    with pytest.raises(InvalidArtifact) as refused:
        onnx_file.check(PATH, content)
    assert refused.value.path == "g.onnx"
    return refused.value.problem


def field(number: int, content: bytes, key_bits: int = 0) -> bytes:
    """A length-delimited protobuf field; `key_bits` are set in its key above the 32 bits that a key may have."""
    return varint(number << 3 | onnx_file.BYTES | key_bits << 32) + varint(len(content)) + content


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def shell() -> bytes:
    """A model without its graph."""
    whole = model()
    whole.ClearField("graph")
    return whole.SerializeToString()


def elsewhere() -> TensorProto:
    """A tensor whose data lies in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


@pytest.mark.parametrize("operator", ["Loop", "If", "Scan", "SequenceMap", "Optional", "RandomNormal", "StringConcat"])
def test_operators_with_bodies_or_without_a_need(operator: str) -> None:
    """Operators that are not on the list are refused by name."""
    assert refusal(model(helper.make_node(operator, ["x"], ["y"])).SerializeToString()) == (
        f"operator '{operator}' is not one that is served"
    )


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "ai.onnx.preview.training", "pkg.evil"])
def test_other_domains(domain: str) -> None:
    """An operator of another domain is refused even where its name is on the list."""
    node = helper.make_node("Identity", ["x"], ["y"], domain=domain)
    assert refusal(model(node).SerializeToString()) == f"operator of the custom domain '{domain}'"


def test_the_standard_domain_has_two_names() -> None:
    """'ai.onnx' is the standard domain, written out."""
    onnx_file.check(PATH, model(helper.make_node("Identity", ["x"], ["y"], domain="ai.onnx")).SerializeToString())


def test_every_name_on_the_list_is_an_operator() -> None:
    """The list holds names that ONNX defines, and none that takes a graph."""
    for operator in onnx_file.OPERATORS:
        attributes = onnx.defs.get_schema(operator, 20).attributes.values()
        assert not any("GRAPH" in str(attribute.type) for attribute in attributes)


def test_external_data_in_a_sparse_constant() -> None:
    """A Constant may be sparse: its values must not lie in another file either."""
    sparse = onnx.SparseTensorProto(
        values=elsewhere(), indices=helper.make_tensor("i", TensorProto.INT64, [1], [0]), dims=[1]
    )
    node = helper.make_node("Constant", [], ["y"], sparse_value=sparse)
    refusal(model(node).SerializeToString())


@pytest.mark.parametrize("attribute", ["tensors", "sparse_tensors", "graphs"])
def test_attributes_that_are_lists(attribute: str) -> None:
    """What is refused alone is refused in a list."""
    node = helper.make_node("Identity", ["x"], ["y"])
    kinds = {"tensors": "TENSORS", "sparse_tensors": "SPARSE_TENSORS", "graphs": "GRAPHS"}
    added = node.attribute.add(name="a", type=onnx.AttributeProto.AttributeType.Value(kinds[attribute]))
    if attribute == "tensors":
        added.tensors.append(elsewhere())
    elif attribute == "graphs":
        added.graphs.add()
    else:
        added.sparse_tensors.append(onnx.SparseTensorProto(values=elsewhere(), dims=[1]))
    refusal(model(node).SerializeToString())


def test_a_field_twice() -> None:
    """Protobuf takes the last of several equal fields, other readers the first: every one of them is looked at."""
    plain, strange = NODE.SerializeToString(), field(4, b"Loop")
    for node in (plain + strange, strange + plain):
        graph = model().graph.SerializeToString() + field(1, node)
        assert "'Loop'" in refusal(shell() + field(7, graph))


@pytest.mark.parametrize("n_graphs", [0, 2])
def test_one_graph(n_graphs: int) -> None:
    """Two graphs would be merged, and a file without one is no model."""
    content = shell() + field(7, model(NODE).graph.SerializeToString()) * n_graphs
    assert refusal(content) == f"it holds {n_graphs} graphs, not one"


def test_a_key_of_more_than_32_bits() -> None:
    """C++ protobuf drops what a key has above 32 bits, and would see a node that a reader of 64 bits does not."""
    forbidden = helper.make_node("Cos", ["x"], ["y"]).SerializeToString()
    hidden = model().graph.SerializeToString() + field(1, forbidden, key_bits=1)
    refusal(shell() + field(7, hidden))


def test_the_runtime_s_own_format() -> None:
    """ONNX Runtime takes any bytes with ORTM at the fifth for its own format, which is not ONNX and would go unseen."""
    content = field(2, b"xxORTM") + shell() + field(7, model(NODE).graph.SerializeToString())
    assert content[4:8] == b"ORTM"
    refusal(content)


@pytest.mark.parametrize("size", [2**31, 2**63 - 1, 2**64 - 1])
def test_lengths_beyond_the_file(size: int) -> None:
    """A field that claims more bytes than there are is refused, and nothing of that size is made."""
    assert "longer than the file" in refusal(shell() + varint(7 << 3 | 2) + varint(size) + b"x")


def test_cut_anywhere() -> None:
    """A graph that is cut off at any byte is refused."""
    content = builders.graphs()["classify"]
    graph_ends = content.index(b"classify")  # the graph itself; a few bytes of opset follow it
    for end in range(graph_ends):
        refusal(content[:end])


def test_nothing_passes_that_onnx_reads_as_forbidden() -> None:
    """Whichever byte is changed: if the file passes, the onnx package too finds only allowed operators and no outside data."""
    content = bytearray(model(helper.make_node("Constant", [], ["c"], value=elsewhere()), NODE).SerializeToString())
    n_passed = 0
    for position in range(len(content)):
        for change in (1, 2, 8, 16, 64, 128):
            content[position] ^= change
            try:
                onnx_file.check(PATH, bytes(content))
                read = onnx.ModelProto.FromString(bytes(content))
            except (InvalidArtifact, DecodeError):
                pass
            else:
                n_passed += 1
                assert not read.functions
                for node in read.graph.node:
                    assert node.op_type in onnx_file.OPERATORS | {""}
                    assert node.domain in ("", "ai.onnx")
                    for attribute in node.attribute:
                        assert not attribute.t.external_data
                        assert not attribute.HasField("g")
            content[position] ^= change
    assert n_passed, "no change made the outside data unreadable, so this proved nothing"
