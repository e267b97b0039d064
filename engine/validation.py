"""Look at what a checkpoint says before any of it is used."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from config import settings_in
from models.weights import is_finite
from utils.errors import UserError
from utils.logger import GROWING

REMEDY = "take another checkpoint (previous.pth is an earlier one), or start from its weights with --pretrained"
MOST_STEPS, MOST_CLASSES = 10**12, 10**6
LARGEST = {"DATA.IMG_SIZE": 2**13, "MODEL.CROSSFORMER.GROUP_SIZE": 2**10, "MODEL.CROSSFORMER.INTERVAL": 2**10}


class Field(NamedTuple):
    """What a field of a checkpoint must be, in words and as a question."""

    expected: str
    holds: Callable[[Any], bool]


def _whole(low: int = 0) -> Field:
    return Field(
        f"a whole number from {low} to {MOST_STEPS:,}", lambda value: type(value) is int and low <= value <= MOST_STEPS
    )


def _number(low: float, high: float) -> Field:
    return Field(f"a number from {low} to {high}", lambda value: type(value) in (int, float) and low <= value <= high)


def _are_classes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_CLASSES
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _are_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(sums, Tensor) and sums.ndim == 1 and _are_fractions(sums)
        for name, sums in value.items()
    )


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in ("total", "in_a_row") and isinstance(count, Tensor) and not count.ndim and _are_fractions(count)
        for name, count in value.items()
    )


def _are_lines(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in GROWING and isinstance(lines, str) and all(ord(letter) < 256 for letter in lines)
        for name, lines in value.items()
    )


def _is_best(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("model"), dict)
        and all(isinstance(weight, Tensor) for weight in value["model"].values())
        and not isinstance(value.get("top1"), Tensor)
        and FIELDS["top1"].holds(value.get("top1"))
    )


FIELDS = {
    "step": _whole(),
    "epoch": _whole(),
    "evaluated_step": _whole(),
    "images": _whole(1),
    "global_batch": _whole(1),
    "best_top1": _number(-1, 100),
    "top1": _number(0, 100),
    "top5": _number(0, 100),
    "loss": Field("a number", lambda value: type(value) in (int, float)),
    "weights": Field("'model' or 'ema'", lambda value: value in ("model", "ema")),
    "classes": Field("a list of names, none of them twice", _are_classes),
    "model": Field("a state dict", lambda value: isinstance(value, dict)),
    "ema": Field("a state dict or None", lambda value: value is None or isinstance(value, dict)),
    "config": Field("a text of settings", lambda value: isinstance(value, str)),
    "meters": Field("the sums of what the log has not told yet", _are_sums),
    "skipped": Field("the counts of the steps that were skipped", _are_counts),
    "skipped_images": _whole(),
    "owed": Field("lines that could not be written, by the names of their files", _are_lines),
    "owed_best": Field("the best weights if they could not be written, or None", _is_best),
}
"""The fields of our checkpoints that are used as they are."""


def check_fields(content: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of ours with a field that is not what it should be.

    Raises:
        UserError: names the field, what was expected and what was found.
    """
    for name, field in FIELDS.items():
        if name in content and not _holds(field, content[name]):
            fail(path, name, field.expected, content[name])
    if "config" in content:
        _check_sizes(settings_in(content["config"], str(path)), path)
    for name, limit in (("evaluated_step", "step"), ("global_batch", "images"), ("epoch", "step")):
        if name in content and limit in content and content[name] > content[limit]:
            fail(path, name, f"at most {limit} {content[limit]:,}", content[name])


def _check_sizes(settings: dict[str, Any], path: str | Path) -> None:
    """Refuse a config whose model would take all of the memory with the smallest of weights."""
    for key, limit in LARGEST.items():
        value = settings.get(key, 0)
        for number in value if isinstance(value, list) else [value]:
            for one in number if isinstance(number, list) else [number]:
                if type(one) is not int or one > limit:
                    fail(path, key, f"whole numbers up to {limit:,}", one)


def facts_of(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Step, accuracy, classes and the like that a checkpoint gives, each as it should be.

    Files of others call other things by these names, which are passed over; in a file of ours they are errors.
    """
    if isinstance(content.get("config"), str):
        check_fields(content, path)
    known = {name: content[name] for name, field in FIELDS.items() if name in content and _holds(field, content[name])}
    return {name: value for name, value in known.items() if not isinstance(value, float) or math.isfinite(value)}


def _holds(field: Field, value: Any) -> bool:
    return not isinstance(value, Tensor) and field.holds(value)


def fail(path: str | Path, name: str, expected: str, found: Any) -> None:
    """Raise the error that says so."""
    raise UserError(f"{path} cannot be used: its {name} is {describe(found)}, expected {expected}; {REMEDY}")


def describe(value: Any) -> str:
    """In a few words, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, bool | float | None) or (isinstance(value, int) and abs(value) < 2**63):
        return repr(value)
    if isinstance(value, str):
        return f"{value[:40]!r}"
    number = f" of {len(value):,}" if isinstance(value, dict | list | tuple | set) else ""
    return f"a {type(value).__name__}{number}"


def optimizer_state(saved: Any, optimizer: Optimizer, path: str | Path) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` may be given, when ``saved`` fits the optimizer's parameters.

    Its kernels trust the shapes and strides of what they are given, and write beyond what is too small.

    Returns:
        the saved state, each tensor like its parameter in memory, in groups with the optimizer's own settings.

    Raises:
        UserError: something is missing, left over, of another shape or kind, or not finite.
    """
    if not isinstance(saved, dict):
        fail(path, "optimizer", "a dict", saved)
    state, groups = saved.get("state"), saved.get("param_groups")
    own_groups = optimizer.state_dict()["param_groups"]
    if not isinstance(state, dict):
        fail(path, "optimizer state", "a dict", state)
    if not isinstance(groups, list) or len(groups) != len(own_groups):
        fail(path, "optimizer param_groups", f"a list of {len(own_groups)}", groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loaded_groups = []
    for i, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        found = group.get("params") if isinstance(group, dict) else group
        if not isinstance(found, list) or any(type(number) is not int for number in found) or found != own["params"]:
            expected = f"the numbers of {len(own['params']):,} parameters"
            fail(path, f"optimizer param_groups[{i}] params", expected, found)
        steps = {"step": _count(group["step"], f"optimizer param_groups[{i}] step", path)} if "step" in group else {}
        loaded_groups.append(own | steps)
    if not state.keys() <= set(range(len(parameters))):
        stranger = next(key for key in state if key not in range(len(parameters)))
        fail(path, "optimizer state", f"parameters below {len(parameters):,} only", stranger)
    kept, seen = kept_for_a_parameter(optimizer), set()
    loaded = {
        i: _of_parameter(state[i], parameter, kept, seen, f"optimizer state[{i}]", path)
        for i, parameter in enumerate(parameters)
        if i in state
    }
    return {"state": loaded, "param_groups": loaded_groups}


def _of_parameter(
    saved: Any, parameter: Tensor, kept: dict[str, Any], seen: set[int], name: str, path: str | Path
) -> dict[str, Any]:
    if not isinstance(saved, dict) or saved.keys() != kept.keys():
        fail(path, name, f"a dict of {', '.join(kept)}", [*saved] if isinstance(saved, dict) else saved)
    return {key: _like(saved[key], parameter, kept[key], seen, f"{name} {key}", path) for key in kept}


def _like(value: Any, parameter: Tensor, kept: Any, seen: set[int], name: str, path: str | Path) -> Any:
    """``value`` if it is what a fresh optimizer keeps there, and lies in memory like the parameter."""
    if not isinstance(kept, Tensor):
        if kept is None and value is not None:
            fail(path, name, "None", value)
        return value if kept is None else _count(value, name, path)
    if not kept.ndim:
        return torch.full_like(kept, float(_count(value, name, path)), device="cpu")
    shape = tuple(parameter.shape)
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not _are_fractions(value):
        fail(path, name, f"a tensor of shape {shape} of fractions", value)
    value = value.to(kept.dtype)
    if not is_finite(value) or (name.endswith("_sq") and bool((value < 0).any())):
        fail(path, name, "finite numbers" + ", none below 0" * name.endswith("_sq"), value)
    storage = value.untyped_storage().data_ptr()
    if value.stride() != parameter.stride() or (storage in seen and value.numel()):
        value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
    seen.add(storage)
    return value


def _are_fractions(value: Tensor) -> bool:
    return value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()


def _count(value: Any, name: str, path: str | Path) -> Any:
    """A number of steps, as a number or as a tensor."""
    number = value
    if isinstance(value, Tensor) and not value.ndim and value.layout == torch.strided and value.device.type == "cpu":
        number = None if value.is_complex() or value.is_quantized or value.dtype == torch.bool else value.item()
    if type(number) not in (int, float) or not 0 <= number <= MOST_STEPS or number != int(number):
        fail(path, name, "a number of steps", value if not isinstance(value, Tensor) or value.ndim else number)
    return value


def kept_for_a_parameter(optimizer: Optimizer) -> dict[str, Any]:
    """What the optimizer remembers of a parameter with two axes, found out by a step of its own kind."""
    twin = object.__new__(type(optimizer))
    first = optimizer.param_groups[0]
    like = next(parameter for group in optimizer.param_groups for parameter in group["params"])
    parameter = torch.zeros(2, 2, dtype=like.dtype, device=like.device, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    twin.__dict__ = {**vars(optimizer), "state": defaultdict(dict), "param_groups": [{**first, "params": [parameter]}]}
    twin.step()
    return twin.state[parameter]


def check_scaler(saved: Any, path: str | Path) -> dict[str, Any]:
    """The state of a loss scale if it can be one; an empty dict where the run had none."""
    known: dict[str, Callable[[Any], bool]] = {
        "scale": lambda value: 0 < value < math.inf,
        "growth_factor": lambda value: 1 < value < math.inf,
        "backoff_factor": lambda value: 0 < value < 1,
        "growth_interval": lambda value: type(value) is int and value >= 1,
        "_growth_tracker": lambda value: type(value) is int and value >= 0,
    }
    if saved is None or saved == {}:
        return {}
    if not isinstance(saved, dict) or saved.keys() != known.keys():
        fail(path, "scaler", f"a dict of {', '.join(known)}", saved)
    for key, holds in known.items():
        if type(saved[key]) not in (int, float) or not holds(saved[key]):
            fail(path, f"scaler {key}", "a number in its range", saved[key])
    return saved
