"""State tracking and recall, the tasks of the paper's Table 5b and of MQAR: generators, models, training side by side."""

from mamba3.tasks.base import Batch, Task
from mamba3.tasks.modular_arithmetic import BracketArithmetic, ModularArithmetic
from mamba3.tasks.mqar import MQAR
from mamba3.tasks.parity import Parity

TASKS: dict[str, type[Task]] = {task.name: task for task in (Parity, ModularArithmetic, BracketArithmetic, MQAR)}


def make_task(name: str) -> Task:
    """The task of that name with its default sizes. ValueError names those that exist."""
    if name not in TASKS:
        raise ValueError(f"a task is one of {', '.join(TASKS)}; it is {name!r}.")
    return TASKS[name]()


__all__ = ["MQAR", "TASKS", "Batch", "BracketArithmetic", "ModularArithmetic", "Parity", "Task", "make_task"]
