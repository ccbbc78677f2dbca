"""A model as the Open Inference Protocol sees it: what tensors it takes and gives, and which task gives each."""

import asyncio
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from service.api.state import State
from service.api.tasks import offers
from service.cells.counts import csr
from service.cells.formats.tensors import describe
from service.inference import TASKS
from service.inference.model import Model
from service.inference.task import Task


@dataclass(frozen=True)
class Output:
    """A column of a task."""

    datatype: str
    widths: tuple[int, ...]
    """Lengths of the axes after the cells."""

    tasks: tuple[Task, ...]
    """Those that give it."""


Outputs = dict[str, Output]
_known: dict[str, tuple[weakref.ref[Model], Outputs]] = {}


async def outputs_of(app: State, model: Model) -> Outputs:
    """What a model gives, by name, in the order of TASKS."""
    made_for, outputs = _known.get(model.id, (None, {}))
    if made_for is None or made_for() is not model:
        outputs = await asyncio.get_running_loop().run_in_executor(app.parsers, _look, model)
        _known[model.id] = weakref.ref(model), outputs
    return outputs


def _look(model: Model) -> Outputs:
    """Ask each task about one empty cell: no other list of columns could disagree with what is answered."""
    nothing = np.empty(0, np.float32)
    empty = csr(nothing, np.empty(0, np.int32), np.zeros(2, np.int32), model.manifest.genes.n_genes)
    outputs: Outputs = {}
    for task in TASKS.values():
        if offers(model, task) and not task.is_composite:
            for name, column in task.run(model, empty, task.read_options({}, model)).items():
                datatype, (_, *widths) = describe(column)
                tasks = outputs[name].tasks if name in outputs else ()
                outputs[name] = Output(datatype, tuple(widths), (*tasks, task))
    return outputs


def tasks_for(outputs: Outputs, names: Iterable[str]) -> list[Task]:
    """The fewest tasks that give these outputs, in the order of TASKS."""
    needed: set[str] = set()
    # Those that one task alone gives come first: what several give may then be had from one of them.
    for output in sorted((outputs[name] for name in names), key=lambda output: len(output.tasks)):
        if not needed & {task.name for task in output.tasks}:
            needed.add(output.tasks[0].name)
    return [task for task in TASKS.values() if task.name in needed]
