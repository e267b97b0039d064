"""Look at what a checkpoint says of the optimizer and the loss scale before any of it is used."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from models.weights import is_finite
from utils.fields import MOST_STEPS, are_fractions, fail


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
    kept = kept_for_a_parameter(optimizer)
    seen: set[int] = set()
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
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not are_fractions(value):
        fail(path, name, f"a tensor of shape {shape} of fractions", value)
    value = value.to(kept.dtype)
    if not is_finite(value) or (name.endswith("_sq") and bool((value < 0).any())):
        fail(path, name, "finite numbers" + ", none below 0" * name.endswith("_sq"), value)
    storage = value.untyped_storage().data_ptr()
    if value.stride() != parameter.stride() or (storage in seen and value.numel()):
        value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
    seen.add(storage)
    return value


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
