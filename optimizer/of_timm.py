"""Optimizers by timm's factory: every name that ``timm.optim.list_optimizers()`` gives, or the reason why not."""

import inspect
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from optimizer.arguments import arguments
from utils.compat import orthogonalise_in_single_precision
from utils.errors import UserError, did_you_mean

REFUSED = {
    "adahessian": "needs second derivatives, which a training step does not compute",
    "kron*": "draws random numbers from a generator of its own, so a run could not be carried on exactly",
    "bnb*": "is of bitsandbytes, whose state of 8 bits could not be checked when a run is carried on",
    "fused*": "is timm's name for one of apex's, which are fused_adam and fused_lamb here",
}
"""Names of timm's that are not taken, and why."""
WAITING = "adamp", "cadamp", "sgdp", "csgdp", "novograd", "novogradc", "novogradw"
"""Those that let the host wait for the device at every step: they decide there what to do with a parameter."""
FALLBACK = "fallback_list", "fallback_no_weight_decay"
"""Arguments of timm's factory: which parameters Muon leaves to AdamW besides those of one axis."""


def names() -> list[str]:
    """List those that are taken."""
    return [name for name in map(str, list_optimizers()) if not refusal(name)]


def refusal(name: str) -> str:
    """Say why an optimizer of timm's is not taken; empty where it is."""
    return next((why for pattern, why in REFUSED.items() if fnmatch(name, pattern)), "")


def check(settings, others: Sequence[str]) -> None:
    """Refuse names and arguments that there are not.

    Args:
        settings: TRAIN.OPTIMIZER.
        others: names that are no business of timm's.

    Raises:
        UserError: names what is wrong.
    """
    name = settings.NAME
    if name not in list_optimizers():
        guess = did_you_mean(name, [*others, *names()])
        raise UserError(
            f"TRAIN.OPTIMIZER.NAME {name} is not known{guess or ';'} It may be {', '.join(others)} or one of timm's: "
            f"{', '.join(names())}"
        )
    if why := refusal(name):
        raise UserError(f"TRAIN.OPTIMIZER.NAME {name} {why}")
    of_class(settings)


def of_class(settings) -> dict[str, Any]:
    """Give what the class of ``settings.NAME`` is called with.

    Raises:
        UserError: it does not take something.
    """
    kind = cast(type, get_optimizer_class(settings.NAME, bind_defaults=False))
    elsewhere = FALLBACK if settings.NAME.endswith("muon") else ()
    found = arguments(settings, kind, get_optimizer_info(settings.NAME).num_betas, elsewhere)
    if "max_grad_norm" in inspect.signature(kind).parameters:
        found.setdefault("max_grad_norm", None)  # TRAIN.CLIP_GRAD has clipped already
    return found


def fallback(settings, model: nn.Module) -> list[str]:
    """List patterns of the parameters that Muon leaves to AdamW, as KWARGS say.

    Raises:
        UserError: a pattern fits no parameter.
    """
    patterns = list(settings.KWARGS.get("fallback_list", ()))
    present = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in present):
            raise UserError(
                f"TRAIN.OPTIMIZER.KWARGS fallback_list: no parameter of the model is called {pattern}; the first is "
                f"{present[0]}, the last {present[-1]}"
            )
    if settings.KWARGS.get("fallback_no_weight_decay") and hasattr(model, "no_weight_decay"):
        patterns += sorted(cast(Any, model).no_weight_decay())
    return patterns


def build(settings, groups: list[dict], lr: float) -> Optimizer:
    """Build the optimizer that timm calls ``settings.NAME``.

    Raises:
        UserError: its class refuses an argument.
    """
    device = next(parameter for group in groups for parameter in group["params"]).device
    if settings.NAME.endswith("muon") and device.type == "cpu":
        orthogonalise_in_single_precision()
    try:
        optimizer = create_optimizer_v2(groups, settings.NAME, lr=lr, **of_class(settings))
        if settings.KWARGS and device.type != "meta":
            small = torch.zeros(2, 2, device=device, requires_grad=True)
            small.grad = torch.zeros_like(small)
            create_optimizer_v2([small], settings.NAME, lr=lr, **of_class(settings)).step()  # refuses the rest
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or "it does not take one of its KWARGS"
        raise UserError(f"TRAIN.OPTIMIZER {settings.NAME}: {reason}") from error
    return optimizer
