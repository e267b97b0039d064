"""The learning rate as a function of the step."""

from lr_scheduler.build import build_scheduler, rate_scale, total_steps
from lr_scheduler.schedules import (
    Schedule,
    constant,
    cosine,
    linear,
    multistep,
    one_cycle,
    poly,
    restarts,
    step_decay,
    with_factor,
    with_warmup,
)

__all__ = [
    "Schedule",
    "build_scheduler",
    "constant",
    "cosine",
    "linear",
    "multistep",
    "one_cycle",
    "poly",
    "rate_scale",
    "restarts",
    "step_decay",
    "total_steps",
    "with_factor",
    "with_warmup",
]
