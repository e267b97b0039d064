"""Look at what a checkpoint says of the optimizer and the loss scale before any of it is used."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from models.weights import is_finite
from optimizer import COUNTERS
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
    like, counted = after_a_step(optimizer)
    loaded_groups = []
    for i, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        found = group.get("params") if isinstance(group, dict) else group
        if not isinstance(found, list) or any(type(number) is not int for number in found) or found != own["params"]:
            expected = f"the numbers of {len(own['params']):,} parameters"
            fail(path, f"optimizer param_groups[{i}] params", expected, found)
        counts = {}
        for key, kept in counted.items():
            if key not in group:
                fail(path, f"optimizer param_groups[{i}] {key}", "a number", None)
            counts[key] = _like(group[key], kept, set(), f"optimizer param_groups[{i}] {key}", path)
        loaded_groups.append(own | counts)
    if not state.keys() <= set(range(len(parameters))):
        stranger = next(key for key in state if key not in range(len(parameters)))
        fail(path, "optimizer state", f"parameters below {len(parameters):,} only", stranger)
    seen: set[int] = set()
    loaded = {
        i: _of_parameter(state[i], like(parameter), seen, f"optimizer state[{i}]", path)
        for i, parameter in enumerate(parameters)
        if i in state
    }
    return {"state": loaded, "param_groups": loaded_groups}


def _of_parameter(saved: Any, kept: dict[str, Any], seen: set[int], name: str, path: str | Path) -> dict[str, Any]:
    if not isinstance(saved, dict) or saved.keys() != kept.keys():
        fail(path, name, f"a dict of {', '.join(kept)}", [*saved] if isinstance(saved, dict) else saved)
    return {key: _like(saved[key], kept[key], seen, f"{name} {key}", path) for key in kept}


def _like(value: Any, kept: Any, seen: set[int], name: str, path: str | Path) -> Any:
    """``value`` if it is what a fresh optimizer keeps there, and lies in memory like that."""
    if kept is None or isinstance(kept, bool | str):
        if value is not kept and value != kept:
            fail(path, name, repr(kept), value)
        return kept
    if not isinstance(kept, Tensor):
        return _number(value, isinstance(kept, int), name, path)
    if not kept.ndim:
        number = _number(value, name.endswith(" step"), name, path)
        return torch.full_like(kept, float(number), device="cpu")
    if not isinstance(value, Tensor) or value.shape != kept.shape or not are_fractions(value):
        fail(path, name, f"a tensor of shape {tuple(kept.shape)} of fractions", value)
    value = value.to(kept.dtype)
    if not is_finite(value) or (name.endswith("_sq") and bool((value < 0).any())):
        fail(path, name, "finite numbers" + ", none below 0" * name.endswith("_sq"), value)
    storage = value.untyped_storage().data_ptr()
    if value.stride() != kept.stride() or (storage in seen and value.numel()):
        value = torch.empty_like(kept, device="cpu").copy_(value)
    seen.add(storage)
    return value


def _number(value: Any, is_count: bool, name: str, path: str | Path) -> Any:
    """A finite number, or a number of steps; as a number or as a tensor."""
    number = value
    if isinstance(value, Tensor) and not value.ndim and value.layout == torch.strided and value.device.type == "cpu":
        number = None if value.is_complex() or value.is_quantized or value.dtype == torch.bool else value.item()
    shown = value if not isinstance(value, Tensor) or value.ndim else number
    if type(number) not in (int, float) or not math.isfinite(number):
        fail(path, name, "a number of steps" if is_count else "a finite number", shown)
    if is_count and (not 0 <= number <= MOST_STEPS or number != int(number)):
        fail(path, name, "a number of steps", shown)
    return value


def after_a_step(optimizer: Optimizer) -> tuple[Callable[[Tensor], dict[str, Any]], dict[str, Any]]:
    """Find out what an optimizer remembers, by steps of its own kind on zeros.

    Returns:
        what it keeps for a parameter, and what it counts in its groups.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    found: dict[tuple, dict[str, Any]] = {}

    def step(parameter: Tensor, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        twin = object.__new__(type(optimizer))
        zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if not isinstance(parameter, DTensor):
            zeros = torch.zeros_like(parameter)  # of its strides too
        zeros.requires_grad_()
        zeros.grad = torch.zeros_like(zeros)
        state: defaultdict = defaultdict(dict)
        if parameter in optimizer.state:  # some begin with it
            state[zeros] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[parameter].items()}
        copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        twin.__dict__ = {**vars(optimizer), "state": state, "param_groups": [{**copied, "params": [zeros]}]}
        twin.step()
        return state[zeros], twin.param_groups[0]

    def kept(parameter: Tensor) -> dict[str, Any]:
        group = groups[parameter]
        kind = tuple(parameter.shape), parameter.stride(), parameter.dtype, bool(group.get("use_fallback"))
        if kind not in found:
            found[kind] = step(parameter, group)[0]
        return found[kind]

    first, of_first = next(iter(groups.items()))
    after = step(first, of_first)[1]
    changed = {key: value for key, value in after.items() if key != "params" and not _same(value, of_first.get(key))}
    counted = changed | {key: after[key] for key in COUNTERS if key in after}  # which may stay at 0 at first
    return kept, counted


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    return value == other


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
