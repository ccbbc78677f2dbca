"""What an ONNX file asks for, read from its bytes without the onnx package and before any session exists.

ONNX is protobuf; only the few fields that matter for safety are walked (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3):
operators and their domains, sub-graphs, functions, and tensors whose data lies in another file.
"""

from collections.abc import Iterator
from pathlib import Path

from service.errors import InvalidArtifact

# Everything that one export needs, and nothing with a body (Loop, If, Scan) or a side effect. Extended when a family needs more.
OPERATORS = frozenset(
    """Abs Add BatchNormalization Cast Clip Concat Constant ConstantOfShape CumSum DequantizeLinear Div Elu Equal Erf Exp Expand Flatten Gather
    Gelu Gemm Greater GreaterOrEqual HardSigmoid Identity LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max Min Mul
    Neg OneHot PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape ScatterElements ScatterND
    Shape Sigmoid Sign Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh TopK Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 - read as a list of words
)

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def check(path: Path, content: bytes) -> None:
    """Refuse a file that needs anything outside itself or an operator that serving does not allow.

    Raises:
        InvalidArtifact: external data, a custom or forbidden operator, a sub-graph, a function, or bytes that are not ONNX.
    """
    if content[4:8] == b"ORTM":  # ONNX Runtime would read these bytes as its own format
        raise InvalidArtifact(path=str(path), problem="in ONNX Runtime's own format, not ONNX")
    try:
        problem = next(_problems(memoryview(content)), None)
    except (IndexError, ValueError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArtifact(path=str(path), problem=f"not a readable ONNX file ({error})") from None
    if problem:
        raise InvalidArtifact(path=str(path), problem=problem)


def operators(content: bytes) -> frozenset[str]:
    """The operators of a file that was checked."""
    return frozenset(
        str(operator, "utf-8")
        for number, graph in _fields(memoryview(content))
        if number == 7  # ModelProto.graph
        for part, node in _fields(graph)
        if part == 1  # GraphProto.node
        for field, operator in _fields(node)
        if field == 4  # NodeProto.op_type
    )


def _problems(model: memoryview) -> Iterator[str]:
    graphs = 0
    for number, value in _fields(model):
        if number == 7:  # ModelProto.graph
            graphs += 1
            yield from _graph_problems(value)
        elif number == 25:  # ModelProto.functions
            yield "it defines functions of its own"
    if graphs != 1:
        yield f"it holds {graphs} graphs, not one"


def _graph_problems(graph: memoryview) -> Iterator[str]:
    for number, value in _fields(graph):
        if number == 1:  # GraphProto.node
            yield from _node_problems(value)
        elif number == 5:  # GraphProto.initializer
            yield from _tensor_problems(value)
        elif number == 15:  # GraphProto.sparse_initializer
            yield "it holds a sparse initializer"


def _node_problems(node: memoryview) -> Iterator[str]:
    for number, value in _fields(node):
        if number == 4 and (operator := str(value, "utf-8")) not in OPERATORS:  # NodeProto.op_type
            yield f"operator '{operator}' is not one that is served"
        elif number == 7 and (domain := str(value, "utf-8")) not in ("", "ai.onnx"):  # NodeProto.domain
            yield f"operator of the custom domain '{domain}'"
        elif number == 5:  # NodeProto.attribute
            for field, content in _fields(value):
                if field in (6, 11):  # AttributeProto.g, graphs
                    yield "an operator holds a sub-graph"
                elif field in (22, 23):  # AttributeProto.sparse_tensor, sparse_tensors
                    yield "an operator holds a sparse tensor"
                elif field in (5, 10):  # AttributeProto.t, tensors
                    yield from _tensor_problems(content)


def _tensor_problems(tensor: memoryview) -> Iterator[str]:
    for number, _ in _fields(tensor):
        if number == 13:  # TensorProto.external_data; data_location (14) alone names no file
            yield "a tensor's data lies outside the file"


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field; a varint's or fixed field's content is empty, for no such field is looked at."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if key >> 32:
            raise ValueError("a key of more than 32 bits, which other readers cut off")
        if wire == VARINT:
            _, position = _varint(message, position)
            yield number, message[0:0]
        elif wire == FIXED64:
            position += 8
        elif wire == FIXED32:
            position += 4
        elif wire == BYTES:
            size, position = _varint(message, position)
            if position + size > len(message):
                raise ValueError("a field is longer than the file")
            yield number, message[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {wire}")
    if position != len(message):
        raise ValueError("a field is longer than the file")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
