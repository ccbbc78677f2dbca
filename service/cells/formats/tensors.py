"""Tensors of the Open Inference Protocol v2: a JSON header and, after it, the bytes of the tensors that are sent as such.

Extensions spoken: binary_tensor_data and parameters. What a header declares is checked against what arrived before anything is made of it.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.cells.columns import Column, Labels, Names, Values
from service.contract import strict_json
from service.errors import InvalidCells, MalformedBody

NUMBERS: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8")}
"""Types of numbers that a tensor sent here may have; BYTES is the third type."""

MAX_AXES = 8


class _Wire(BaseModel):
    """Strict about what is read, and blind to what other servers read besides."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Input(_Wire):
    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**63 - 1)]], Field(max_length=MAX_AXES)]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class Wanted(_Wire):
    """An output that the client asks for."""

    name: str
    parameters: dict[str, Any] = {}


class _Header(_Wire):
    id: str | None = None
    parameters: dict[str, str | bool | int | float] = {}
    inputs: Annotated[list[_Input], Field(min_length=1)]
    outputs: list[Wanted] = []


@dataclass(frozen=True)
class Tensor:
    """One input, as sent; `numbers` or `words` read it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    content: memoryview | list[Any]
    """Its bytes, or its JSON values in row-major order, nested or not."""

    def numbers(self) -> NDArray[Any]:
        """An array of `shape`: little-endian where the bytes lie, float64 or int64 where it was sent as JSON.

        Raises:
            InvalidCells: there are more or fewer elements than the shape says, or something else than numbers.
        """
        dtype, n_elements = NUMBERS[self.datatype], math.prod(self.shape)
        if isinstance(self.content, memoryview):
            self._check(len(self.content), n_elements * dtype.itemsize, "bytes")
            # A header of an odd length leaves them between words, where sparse arithmetic cannot read them.
            return np.require(np.frombuffer(self.content, dtype), requirements="A").reshape(self.shape)
        values = self._flat(n_elements)
        if not {type(value) for value in values} <= ({int} if dtype.kind == "i" else {int, float}):
            raise InvalidCells(problem=f"The data of input '{self.name}' must be numbers of type {self.datatype}.")
        try:
            # Not rounded to float32: a count that is none must not become one by being read.
            return np.array(values, dtype=np.float64 if dtype.kind == "f" else dtype).reshape(self.shape)
        except OverflowError:
            raise InvalidCells(problem=f"Input '{self.name}' has a number beyond {self.datatype}.") from None

    def words(self) -> list[str]:
        """The elements of a BYTES tensor.

        Raises:
            InvalidCells: there are more or fewer than the shape says, or they are no UTF-8.
        """
        n_elements = math.prod(self.shape)
        if not isinstance(self.content, memoryview):
            values = self._flat(n_elements)
            if not all(isinstance(value, str) for value in values):
                raise InvalidCells(problem=f"The data of input '{self.name}' must be strings.")
            return values
        words: list[str] = []
        position, end = 0, len(self.content)
        while position < end and len(words) <= n_elements:
            start = position + 4
            position = start + struct.unpack_from("<I", self.content, position)[0] if start <= end else end + 1
            if position > end:
                raise InvalidCells(
                    problem=f"Element {len(words)} of input '{self.name}' ends beyond the input's {end:,} bytes: each must be "
                    "4 bytes of length, little-endian, and as many bytes."
                )
            try:
                words.append(str(self.content[start:position], "utf-8"))
            except UnicodeDecodeError:
                raise InvalidCells(problem=f"Element {len(words)} of input '{self.name}' is not UTF-8.") from None
        self._check(len(words), n_elements, "elements")
        return words

    def _flat(self, n_elements: int) -> list[Any]:
        values: list[Any] = self.content  # type: ignore[assignment]
        for _ in range(len(self.shape) - 1):
            if not all(isinstance(value, list) for value in values):
                break
            values = list(chain.from_iterable(values))
        self._check(len(values), n_elements, "elements")
        return values

    def _check(self, n_found: int, n_expected: int, what: str) -> None:
        if n_found != n_expected:
            raise InvalidCells(
                problem=f"Input '{self.name}' of type {self.datatype} and shape {list(self.shape)} must have {n_expected:,} {what}, "
                f"but {'more than that' if n_found > n_expected and what == 'elements' else f'{n_found:,}'} arrived."
            )


@dataclass(frozen=True)
class InferRequest:
    """What a client asks for."""

    id: str | None
    parameters: Mapping[str, str | bool | int | float]
    inputs: Mapping[str, Tensor]
    outputs: tuple[Wanted, ...]
    """Empty means all."""


def read(body: bytes, header_length: int | None = None) -> InferRequest:
    """A request as sent.

    Args:
        body: the JSON header and the bytes after it.
        header_length: bytes of the header; None where it is all of the body.

    Raises:
        MalformedBody: no JSON, or its bytes are not those that it declares.
        InvalidCells: JSON, but no request of this protocol.
    """
    view = memoryview(body)
    if header_length is not None and not 0 < header_length <= len(view):
        raise MalformedBody(
            problem=f"Inference-Header-Content-Length is {header_length:,}, but must be 1 to the {len(view):,} bytes of the body: a body "
            "without a JSON header is not read here."
        )
    try:
        header = _Header.model_validate(strict_json.loads(view[:header_length]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"]) or "the request"
        raise InvalidCells(problem=f"{place}: {first['msg']}.") from None
    except ValueError as error:
        raise MalformedBody(problem=f"The JSON of the request cannot be read: {error}.") from None
    inputs: dict[str, Tensor] = {}
    position = len(view) if header_length is None else header_length
    for sent in header.inputs:
        if sent.name in inputs:
            raise InvalidCells(problem=f"Input '{sent.name[:60]}' is sent twice.")
        size = sent.parameters.get("binary_data_size")
        if unknown := sorted(set(sent.parameters) - {"binary_data_size"}):
            raise InvalidCells(
                problem=f"Parameter '{unknown[0][:60]}' of input '{sent.name[:60]}' is not known here; shared memory is not used."
            )
        if (size is None) == (sent.data is None):
            raise InvalidCells(
                problem=f"Input '{sent.name[:60]}' must have either 'data' or the parameter 'binary_data_size'."
            )
        content: memoryview | list[Any] = sent.data or []
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(view) - position:
                raise MalformedBody(
                    problem=f"binary_data_size of input '{sent.name[:60]}' is {str(size)[:40]}, but {len(view) - position:,} bytes "
                    "are left of the body. Is Inference-Header-Content-Length set?"
                )
            content = view[position : position + size]
            position += size
        inputs[sent.name] = Tensor(sent.name[:60], sent.datatype[:20], tuple(sent.shape), content)
    if position != len(view):
        raise MalformedBody(problem=f"{len(view) - position:,} bytes after the last input belong to none.")
    return InferRequest(header.id, header.parameters, inputs, tuple(header.outputs))


def describe(column: Column) -> tuple[str, tuple[int, ...]]:
    """Datatype and shape of a column as a tensor, the cells first."""
    if isinstance(column, Labels | Names):
        return "BYTES", column.codes.shape
    if isinstance(column, Values) and column.values.dtype == bool:
        return "BOOL", column.values.shape
    return "FP32", column.values.shape


def write(head: Mapping[str, Any], outputs: Sequence[tuple[str, Column, bool]]) -> tuple[bytes, int | None]:
    """An answer.

    Args:
        head: everything but the outputs.
        outputs: name, column, and whether it goes as bytes.

    Returns:
        The body, and the bytes of its header where tensors follow it.
    """
    entries, pieces = [], []
    for name, column, is_binary in outputs:
        datatype, shape = describe(column)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if is_binary:
            pieces.append(_bytes(column))
            entry["parameters"] = {"binary_data_size": len(pieces[-1])}
        elif isinstance(column, Labels | Names):
            entry["data"] = [column.words[code] for code in column.codes.reshape(-1)]
        else:
            entry["data"] = np.ascontiguousarray(column.values).reshape(-1)
        entries.append(entry)
    header = orjson.dumps({**head, "outputs": entries}, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([header, *pieces]), len(header)) if pieces else (header, None)


def _bytes(column: Column) -> bytes:
    if isinstance(column, Labels | Names):
        words = [struct.pack("<I", len(word.encode())) + word.encode() for word in column.words]
        return b"".join([words[code] for code in column.codes.reshape(-1)])
    return column.values.astype("u1" if column.values.dtype == bool else "<f4", copy=False).tobytes()
