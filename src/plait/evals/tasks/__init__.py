"""The tasks that there are."""

from plait.evals.task import Task
from plait.evals.tasks import arc, blimp, lambada, piqa

TASKS: dict[str, Task] = {task.name: task for task in (blimp.TASK, lambada.TASK, arc.EASY, arc.CHALLENGE, piqa.TASK)}
