"""What a task is: the thing that a client asks for, as one frozen value."""

from collections.abc import Callable
from dataclasses import dataclass

import scipy.sparse as sp
from pydantic import BaseModel, ConfigDict

from service.cells.columns import Columns
from service.inference.model import Model


class Options(BaseModel):
    """Options of a task; each field is a query parameter and an option of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def check(self, model: Model) -> None:
        """Refuse values that this model cannot serve.

        Raises:
            InvalidOption: names the option, its value and what is allowed.
        """


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
