"""What the settings of TRAIN.OPTIMIZER mean for the class of an optimizer."""

import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from utils.errors import UserError, did_you_mean

BY_SETTINGS = {
    "lr": "TRAIN.BASE_LR",
    "weight_decay": "TRAIN.WEIGHT_DECAY",
    "betas": "TRAIN.OPTIMIZER.BETAS",
    "eps": "TRAIN.OPTIMIZER.EPS",
    "momentum": "TRAIN.OPTIMIZER.MOMENTUM",
}
"""Arguments that are settings of their own."""
MOMENTUM = 0.9
"""Where neither the settings nor the class say more."""


def arguments(settings, kind: type, betas: int = 2, elsewhere: Sequence[str] = ()) -> dict[str, Any]:
    """Give what an optimizer's class is called with besides parameters, rate and weight decay.

    Args:
        settings: TRAIN.OPTIMIZER.
        kind: the class.
        betas: how many it has.
        elsewhere: names in KWARGS that are not for the class.

    Raises:
        UserError: the class does not take something.
    """
    name, taken = settings.NAME, inspect.signature(kind).parameters
    found: dict[str, Any] = {}
    if "momentum" in taken:
        own = taken["momentum"].default
        found["momentum"] = own if isinstance(own, float) and own else MOMENTUM
    given = {
        "BETAS": tuple(settings.BETAS) or None,
        "EPS": settings.EPS or None,
        "MOMENTUM": settings.MOMENTUM if settings.MOMENTUM >= 0 else None,
    }
    for key, value in given.items():
        if value is None:
            continue
        if key.lower() not in taken:
            if key == "MOMENTUM" and value == MOMENTUM:
                continue  # timm's args.yaml has it with every optimizer
            raise UserError(f"TRAIN.OPTIMIZER.{key}: {name} has none; leave it out")
        if key == "BETAS" and len(settings.BETAS) != betas:
            raise UserError(f"TRAIN.OPTIMIZER.BETAS: {name} has {betas}, not {len(settings.BETAS)}")
        found[key.lower()] = value
    known = [argument for argument in taken if argument not in ("params", *BY_SETTINGS)]
    for key, value in settings.KWARGS.items():
        if key in BY_SETTINGS:
            raise UserError(f"TRAIN.OPTIMIZER.KWARGS {key} is {BY_SETTINGS[key]} here")
        if key in elsewhere:
            continue
        if key not in known:
            raise UserError(
                f"TRAIN.OPTIMIZER.KWARGS: {name} does not take {key}{did_you_mean(key, known)}; "
                f"it takes {', '.join(known)}"
            )
        found[key] = _number(value)
    return found


def _number(value: Any) -> Any:
    """Take a text such as 1e-4, which YAML does not take for a number, for one."""
    with suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) and re.fullmatch(r"[-+.\de]+", value) else value
    return value
