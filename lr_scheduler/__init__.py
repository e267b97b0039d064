"""The learning rate as a function of the step."""

from lr_scheduler.build import build_scheduler, rate_scale, total_steps
from lr_scheduler.schedules import Schedule, cosine, linear, multistep, poly, step_decay, with_factor, with_warmup

__all__ = [
    "Schedule",
    "build_scheduler",
    "cosine",
    "linear",
    "multistep",
    "poly",
    "rate_scale",
    "step_decay",
    "total_steps",
    "with_factor",
    "with_warmup",
]
