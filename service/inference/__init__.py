"""Tasks, by the word that is their route, metric label and command. To add one: write its file and name it here."""

from service.inference import annotate, describe, embed, explain, mapping, reconstruct
from service.inference.task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (embed, reconstruct, annotate, mapping, explain, describe)
}
