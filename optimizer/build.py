"""From a config and a model to an optimizer."""

import math
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import Optimizer

from utils.errors import UserError

APEX_HINT = (
    "needs NVIDIA apex, which is built from source (https://github.com/NVIDIA/apex#installation); "
    "without it use TRAIN.OPTIMIZER.NAME adamw, which is fused on a GPU"
)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, without: str = "1d"
) -> list[dict]:
    """Groups with weight decay, and without.

    Without are, as ``without`` says: ``1d`` biases, other 1-d parameters and ``model.no_weight_decay()``; ``norm``
    those that have it in their name; ``none`` none.

    With a ``layer_decay`` below 1 there are two such groups for each layer (as ``model.group_matcher()`` counts them),
    whose ``lr_scale`` is ``layer_decay`` to the number of layers above it.
    """
    exempt = cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if layer_decay != 1:
        return param_groups_layer_decay(model, weight_decay, exempt, layer_decay=layer_decay)
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = {
                "1d": parameter.ndim <= 1 or name.endswith(".bias") or name in exempt,
                "norm": "norm" in name,
                "none": False,
            }[without]
            (undecayed if is_exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def build_optimizer(config, model: nn.Module) -> Optimizer:
    """The optimizer that ``config.TRAIN.OPTIMIZER`` names, over the model's parameters.

    The training loop sets the learning rate at each step, by :func:`set_learning_rate`.
    """
    settings = config.TRAIN.OPTIMIZER
    train = config.TRAIN
    groups = parameter_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY, train.NO_WEIGHT_DECAY)
    adam = dict(lr=config.TRAIN.BASE_LR, betas=tuple(settings.BETAS), eps=settings.EPS)
    match settings.NAME:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True, **adam)
        case "sgd":
            return _sgd(groups, config.TRAIN.BASE_LR, settings.MOMENTUM)
        case "fused_adam":
            return _apex().FusedAdam(groups, adam_w_mode=True, **adam)
        case "fused_lamb":
            return _apex().FusedLAMB(groups, max_grad_norm=math.inf, **adam)  # TRAIN.CLIP_GRAD has clipped already
        case unknown:
            raise UserError(f"TRAIN.OPTIMIZER.NAME {unknown} is not one of adamw, sgd, fused_adam, fused_lamb")


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
