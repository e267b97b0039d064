"""Settings that are otherwise in some epochs: what TRAIN.CURRICULUM means for a run."""

from typing import Any, cast

import torch
from torch import nn

from config import Config, flatten, phases
from engine.ema import Ema
from engine.model import check_image_size, check_smallest_batch
from models import set_drop_path_rate
from tasks import Task
from utils.calendar import Calendar
from utils.compat import compile_many_models


class Curriculum:
    """Lets a run enter its phases; a phase is a function of the step. What the loader does, it does by itself.

    Args:
        calendar: of the run.
        model: whose stochastic depth may change.
        ema: whose decay may.
    """

    def __init__(self, config: Config, calendar: Calendar, task: Task, model: nn.Module, ema: Ema | None):
        self.phases = [(calendar.first_step(epoch), epoch, phase) for epoch, phase in phases(config)]
        self.config, self.task, self.model, self.ema = config, task, model, ema
        self._now = -1

    def check(self, device: torch.device) -> None:
        """Find out whether the model takes the images of all phases.

        Raises:
            UserError: it does not, or the teacher does not.
        """
        check_smallest_batch(self.config, self.model, min(phase.DATA.BATCH_SIZE for *_, phase in self.phases))
        sizes = {str(phase.DATA.IMG_SIZE): phase.DATA.IMG_SIZE for *_, phase in self.phases}
        for size in sizes.values() if self.task.teacher else ():
            check_image_size(cast(Any, self.task.teacher), size, device)
        if len(self.phases) == 1:
            return  # the model itself has been asked before
        for size in sizes.values():
            check_image_size(self.model, size, device)
        for *_, phase in self.phases:
            set_drop_path_rate(self.model, phase, self.config)
        if self.config.TRAIN.COMPILE != "none":
            compile_many_models()  # a graph for each size, in training and in evaluation

    def enter(self, step: int) -> str:
        """Train as the phase of this step says; returns a line where a phase begins, or is carried on."""
        if len(self.phases) == 1:
            return ""
        number = max(i for i, (begins, *_) in enumerate(self.phases) if begins <= step)
        if number == self._now:
            return ""
        self._now = number
        _, epoch, phase = self.phases[number]
        cast(Any, self.task).phase = phase  # only classification has a curriculum
        set_drop_path_rate(self.model, phase, self.config)
        if self.ema and phase.TRAIN.EMA_DECAY:  # which is 0 for an average that has no decay
            self.ema.decay = phase.TRAIN.EMA_DECAY
        there = [flatten(other) for *_, other in self.phases]
        changing = [key for key in there[0] if len({str(one[key]) for one in there}) > 1]
        return f"from epoch {epoch + 1} on: " + ", ".join(f"{key} {there[number][key]}" for key in changing)
