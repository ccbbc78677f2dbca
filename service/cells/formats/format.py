"""What a wire format is: how cells are read from bytes and how columns are written to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeVar, TypeVarTuple

from pydantic import BaseModel

from service.cells.columns import Columns
from service.cells.counts import Cells
from service.errors import InvalidCells

MAX_GENES = 200_000
MAX_NAME = 256


class Writer(Protocol):
    """Writes one answer, piece by piece. An answer without the bytes of `end` is recognisably incomplete."""

    def start(self, head: dict[str, Any]) -> bytes:
        """The bytes before the first cell; `head` says which model answered and what became of genes and counts."""

    def write(self, columns: Columns, cell_ids: Sequence[str] | None) -> bytes:
        """The bytes of some cells, in the order they were sent."""

    def end(self) -> bytes:
        """The bytes after the last cell."""


@dataclass(frozen=True)
class Format:
    """One media type."""

    media_type: str
    writer: Callable[[], Writer]
    description: str
    """How cells are laid out in it, Markdown for the API's documentation."""

    schema: dict[str, Any]
    """JSON Schema of the request body, for OpenAPI."""

    read: Callable[[bytes, int], Cells] | None = None
    """(body, most bytes that it may decode to) → cells. Raises MalformedBody, InvalidCells, NoCells, BodyTooLarge. None where bodies are not
    read from memory: a format of answers only, or of files."""

    is_file: bool = False
    """Bodies and answers are whole files on disk, read and written by another process; what `writer` writes is what it makes them of."""

    options: type[BaseModel] | None = None
    """Query parameters that say how a body is to be read."""

    @property
    def is_body(self) -> bool:
        """Whether cells can be sent in it; answers can be had in every format."""
        return self.read is not None or self.is_file

    read_genes: Callable[[bytes], tuple[str, ...]] | None = None
    """Body → names of the genes alone, cells or none. Raises MalformedBody, InvalidCells. None where a format has no way to say that."""


N_REMEMBERED = 16
Arguments = TypeVarTuple("Arguments")
Given = TypeVar("Given")


def remembered(function: Callable[[*Arguments], Given]) -> Callable[[*Arguments], Given]:
    """The function, remembering what it gave for the last few arguments: a client sends the same genes with every request.

    Arguments are compared and not hashed, which takes a tenth of the time for bytes.
    """
    known: tuple[tuple[tuple[*Arguments], Given], ...] = ()

    @wraps(function)
    def remembering(*arguments: *Arguments) -> Given:
        nonlocal known  # replaced as a whole, for several threads read bodies
        for others, given in known:
            if others == arguments:
                return given
        given = function(*arguments)
        known = ((arguments, given), *known[: N_REMEMBERED - 1])
        return given

    return remembering


def check_names(names: object, what: str) -> tuple[str, ...]:
    """A list of names as a tuple.

    Raises:
        InvalidCells: it is no list of non-empty printable words of at most 256 characters.
    """
    if not isinstance(names, list) or not names:
        raise InvalidCells(problem=f"'{what}' must be a list of names, and not empty.")
    if len(names) > MAX_GENES and what == "genes":
        raise InvalidCells(problem=f"'{what}' has {len(names):,} names; no genome has more than {MAX_GENES:,}.")
    for position, name in enumerate(names):
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InvalidCells(
                problem=f"'{what}'[{position}] must be a printable name of 1 to {MAX_NAME} characters, not {str(name)[:40]!r}."
            )
    return tuple(names)
