"""What a task is: the thing that a client asks for, as one frozen value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import scipy.sparse as sp
from pydantic import BaseModel, ConfigDict, ValidationError

from service.cells.columns import Columns
from service.errors import InvalidOption
from service.inference.model import Model


class Options(BaseModel):
    """Options of a task; each field is a query parameter and an option of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def check(self, model: Model) -> None:
        """Refuse values that this model cannot serve.

        Raises:
            InvalidOption: names the option, its value and what is allowed.
        """

    def about(self, model: Model) -> dict[str, Any]:  # noqa: ARG002 - for tasks that have something to say
        """What the head of the answer says of these options with this model."""
        return {}


@dataclass(frozen=True)
class Task:
    """A plain function of a model and aligned counts, with its name and what it needs."""

    name: str
    """Route, metric label and command are this word."""

    summary: str
    """First line of its documentation."""

    description: str
    """The columns of the answer, in Markdown."""

    graphs: tuple[str, ...]
    """ONNX graphs that the artifact must hold."""

    run: Callable[[Model, sp.csr_matrix, "Options"], Columns]
    """(model, counts aligned to its genes, options) → columns, one entry per cell. A cell's values do not depend on other cells."""

    options: type[Options] = Options
    needs_reference: bool = False
    """Whether the artifact must hold reference cells."""

    is_composite: bool = False
    """Whether it gives columns of other tasks only."""

    def offered_by(self, model: Model) -> bool:
        """Whether a model has all that the task needs."""
        return set(self.graphs) <= set(model.sessions) and (model.reference is not None or not self.needs_reference)

    @cached_property
    def _defaults(self) -> Options:
        return read_options(self.name, self.options, {})

    def read_options(self, values: Mapping[str, str], model: Model) -> Options:
        """The options as a person wrote them, checked.

        Raises:
            InvalidOption: an option is unknown, or has a value that is not allowed or that the model cannot serve.
        """
        options = read_options(self.name, self.options, values) if values else self._defaults
        options.check(model)
        return options


def read_options(name: str, kind: type[Options], values: Mapping[str, str]) -> Options:
    """Options as a person wrote them.

    Args:
        name: of what takes them.
        kind: its options.
        values: by name.

    Raises:
        InvalidOption: an option is unknown, or has a value that is not allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "?"
        known = ", ".join(kind.model_fields) or "no options"
        reason = f"unknown; {name} takes {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidOption(name=field[:60], problem=f"{reason}.") from None
