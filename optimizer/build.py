"""From a config and a model to an optimizer."""

import math
from collections.abc import Collection
from fnmatch import fnmatch
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import Optimizer

from optimizer import of_timm, schedule_free
from optimizer.arguments import MOMENTUM, arguments
from utils.errors import UserError

APEX_HINT = (
    "needs NVIDIA apex, which is built from source (https://github.com/NVIDIA/apex#installation); "
    "without it use TRAIN.OPTIMIZER.NAME adamw, which is fused on a GPU"
)
OWN = "adamw", "sgd", "fused_adam", "fused_lamb"
"""Built here: torch's in their fused form, and apex's. For other names it is schedule_free's, and timm's factory."""
BETAS, EPS = (0.9, 0.999), 1e-8


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    without: str = "1d",
    fallback: Collection[str] = (),
) -> list[dict]:
    """Groups with weight decay, and without.

    Without are, as ``without`` says: ``1d`` biases, other 1-d parameters and ``model.no_weight_decay()``; ``norm``
    those that have it in their name; ``none`` none.

    With a ``layer_decay`` below 1 there are two such groups for each layer (as ``model.group_matcher()`` counts them),
    whose ``lr_scale`` is ``layer_decay`` to the number of layers above it.

    Parameters whose name fits a pattern of ``fallback`` are in groups of their own with ``use_fallback``: those that
    Muon leaves to AdamW.
    """
    exempt = cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if layer_decay != 1:
        return param_groups_layer_decay(model, weight_decay, exempt, fallback_list=fallback, layer_decay=layer_decay)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, False): [], (False, True): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = {
                "1d": parameter.ndim <= 1 or name.endswith(".bias") or name in exempt,
                "norm": "norm" in name,
                "none": False,
            }[without]
            falls_back = any(fnmatch(name, pattern) for pattern in fallback)
            groups.setdefault((falls_back, is_exempt), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if is_exempt else weight_decay}
        | ({"use_fallback": True} if falls_back else {})
        for (falls_back, is_exempt), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(config, model: nn.Module, rate: float = 1.0) -> Optimizer:
    """The optimizer that ``config.TRAIN.OPTIMIZER`` names, over the model's parameters.

    The training loop sets the learning rate at each step, by :func:`set_learning_rate`.

    Args:
        rate: TRAIN.BASE_LR times this is the run's largest learning rate, which some optimizers want to know.

    Raises:
        UserError: there is none of the name, or one of its arguments is wrong.
    """
    settings, train = config.TRAIN.OPTIMIZER, config.TRAIN
    check_optimizer(config)
    groups = parameter_groups(
        model, train.WEIGHT_DECAY, train.LAYER_DECAY, train.NO_WEIGHT_DECAY, of_timm.fallback(settings, model)
    )
    base_lr = train.BASE_LR * rate
    if schedule_free.averages_by_itself(settings.NAME):
        return schedule_free.build(settings, groups, base_lr)
    if settings.NAME not in OWN:
        return of_timm.build(settings, groups, base_lr)
    adam = dict(lr=base_lr, betas=tuple(settings.BETAS) or BETAS, eps=settings.EPS or EPS)
    match settings.NAME:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True, **adam)
        case "sgd":
            return _sgd(groups, base_lr, MOMENTUM if settings.MOMENTUM < 0 else settings.MOMENTUM)
        case "fused_adam":
            return _apex().FusedAdam(groups, adam_w_mode=True, **adam)
    return _apex().FusedLAMB(groups, max_grad_norm=math.inf, **adam)  # TRAIN.CLIP_GRAD has clipped already


def check_optimizer(config) -> None:
    """Refuse an optimizer that there is not, or arguments that it does not take, before anything is built.

    Raises:
        UserError: so it is.
    """
    settings = config.TRAIN.OPTIMIZER
    if schedule_free.averages_by_itself(settings.NAME):
        arguments(settings, schedule_free.class_of(settings.NAME))
        if config.TRAIN.EMA_DECAY:
            raise UserError(f"TRAIN.EMA_DECAY: {settings.NAME} averages the weights itself; leave it out")
    elif settings.NAME in OWN:
        if settings.KWARGS:
            raise UserError(
                f"TRAIN.OPTIMIZER.KWARGS: {settings.NAME} has none; its settings are BETAS, EPS and MOMENTUM"
            )
        if settings.BETAS and len(settings.BETAS) != len(BETAS):
            raise UserError(f"TRAIN.OPTIMIZER.BETAS: {settings.NAME} has two, for example [0.9, 0.999]")
    else:
        of_timm.check(settings, [*OWN, *schedule_free.CLASSES])


def describe_optimizer(config, device: torch.device) -> str:
    """Say in a line what somebody may not expect of the optimizer; empty where there is nothing."""
    name, schedule = config.TRAIN.OPTIMIZER.NAME, config.TRAIN.LR_SCHEDULER.NAME
    if name in of_timm.WAITING and device.type == "cuda":
        return f"{name} lets the host wait for the device at every step"
    if schedule_free.averages_by_itself(name) and schedule != "constant":
        return f"{name} is made for TRAIN.LR_SCHEDULER.NAME constant, and this is {schedule}"
    return ""


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Let the next step use this rate, or that share of it which is a group's ``lr_scale`` (``TRAIN.LAYER_DECAY``)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def _sgd(groups: list[dict], lr: float, momentum: float) -> Optimizer:
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    if momentum > 0:
        # The fused kernel leaves its momentum uninitialised when the very first step is skipped (fp16 overflow)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _apex():
    try:
        import apex.optimizers
    except ImportError as error:
        raise UserError(f"TRAIN.OPTIMIZER.NAME fused_adam and fused_lamb: {APEX_HINT}") from error
    return apex.optimizers
