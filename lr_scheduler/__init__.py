"""The learning rate as a function of the step."""

from lr_scheduler.build import build_scheduler
from lr_scheduler.schedules import Schedule, cosine, linear, step_decay, with_warmup

__all__ = ["Schedule", "build_scheduler", "cosine", "linear", "step_decay", "with_warmup"]
