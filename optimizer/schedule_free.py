"""Optimizers that need no schedule, and the average of the weights that is to be used.

Source: arXiv 2405.15682. The weights that are trained are the paper's y; z is in the optimizer's state; x, the average,
follows from both.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from optimizer.arguments import arguments
from utils.errors import UserError

CLASSES = {
    "schedule_free_adamw": "AdamWScheduleFree",
    "schedule_free_sgd": "SGDScheduleFree",
    "schedule_free_radam": "RAdamScheduleFree",
}
"""Names in the settings, and in the package ``schedulefree``."""


COUNTERS = "k", "weight_sum", "lr_max", "scheduled_lr"
"""What they count in their groups, and what a checkpoint has to hold."""


def class_of(name: str) -> type:
    """Give the class of an optimizer.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import schedulefree
    except ImportError as error:
        raise UserError(f"TRAIN.OPTIMIZER.NAME {name} needs a package: pip install schedulefree") from error
    return getattr(schedulefree, CLASSES[name])


def build(settings, groups: list[dict], lr: float) -> Optimizer:
    """Build the optimizer that is called ``settings.NAME``.

    Raises:
        UserError: it does not take an argument.
    """
    kind = class_of(settings.NAME)
    given = arguments(settings, kind)
    if 0 in (given.get("momentum", 1), *given.get("betas", ())[:1]):
        raise UserError(f"TRAIN.OPTIMIZER {settings.NAME}: the first of BETAS, or MOMENTUM, must be above 0")
    try:
        optimizer = kind(groups, lr=lr, **given)
    except (TypeError, ValueError) as error:
        raise UserError(f"TRAIN.OPTIMIZER {settings.NAME}: {error}") from error
    optimizer.train()  # and it stays so: the average has a place of its own
    return optimizer


def averages_by_itself(name: str) -> bool:
    """Tell whether an optimizer is one of these."""
    return name in CLASSES


@torch.no_grad()
def averages(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Give the average of each parameter; of one that has had no gradient yet it is the parameter."""
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        for parameter in group["params"]:
            z = optimizer.state[parameter].get("z") if parameter in optimizer.state else None
            found[parameter] = parameter if z is None else parameter.lerp(z, 1 - 1 / beta)
    return found
