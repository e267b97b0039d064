"""A teacher is looked at before it is believed."""

from collections.abc import Callable
from typing import Any, cast

import torch

from config import Config
from data.loading import EvalLoader
from engine.evaluate import evaluate
from engine.precision import Precision
from tasks import Task
from tasks.distillation import read_teacher
from utils.errors import UserError


def task_with_teacher(choose_task: Callable[..., Task], config: Config, device: torch.device) -> Task:
    """Make the task of a config, with the teacher that it names. A collective.

    Raises:
        AgreedError: the teacher cannot be read.
    """
    trained = read_teacher(config)
    task = choose_task(config, device)
    if trained is not None:
        cast(Any, task).learns_from = trained  # only classification has one
    return task


def check_teacher(task: Task, val: EvalLoader, precision: Precision) -> str:
    """Evaluate the teacher of a task as its student will be; returns a line about it. A collective.

    Raises:
        UserError: it is too bad to learn from.
    """
    teacher = cast(Any, task.teacher)
    evaluator = task.evaluator()
    found = evaluate(teacher, val, precision, evaluator)[task.best_is]
    if found < teacher.least:
        raise UserError(
            f"the teacher {teacher.source} has {task.best_title} {found:.2f} on the validation images, where "
            f"{teacher.least:.2f} is the least (TRAIN.TEACHER.AT_LEAST): are the classes and the images those that it "
            "was trained on?"
        )
    return f"learning from {teacher.source}, whose {task.best_title} is {found:.2f}"
