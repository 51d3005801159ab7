"""Tasks with exact scores: generated texts whose answers are known, for `--data task:NAME`.

    recall, copying     what attention looks up, and what a state of fixed size forgets
    regression          a function learned from points in the context
    sums, sums_steps    arithmetic without and with worked steps
    calculator          a tool that the model calls while it writes
    scenes              pictures and sentences

base.py says what a task is; docs/tasks.md shows a text of each, its score and the bounds of it.
"""

from mlx_transformer.data.tasks.base import HELD_OUT, Example, Level, Task
from mlx_transformer.data.tasks.calculator import Calculator
from mlx_transformer.data.tasks.copying import Copying
from mlx_transformer.data.tasks.recall import Recall
from mlx_transformer.data.tasks.regression import Regression
from mlx_transformer.data.tasks.scenes import Scenes
from mlx_transformer.data.tasks.sums import Sums, SumsWithSteps
from mlx_transformer.utils.errors import BadInput

__all__ = ["HELD_OUT", "PREFIX", "TASKS", "Example", "Level", "Task", "find_task", "is_task"]

PREFIX = "task:"
TASKS: dict[str, Task] = {
    task.name: task for task in (Recall(), Copying(), Regression(), Sums(), SumsWithSteps(), Calculator(), Scenes())
}


def is_task(data: str) -> bool:
    """Whether `--data` names a task."""
    return data.startswith(PREFIX)


def find_task(name: str) -> Task:
    """Return the task of "task:NAME" or "NAME". Raises BadInput for an unknown one, and lists all."""
    found = TASKS.get(name.removeprefix(PREFIX))
    if found is None:
        known = ", ".join(f"{PREFIX}{known}" for known in TASKS)
        raise BadInput(f"{PREFIX}{name.removeprefix(PREFIX)} is no task: expected one of {known}")
    return found
