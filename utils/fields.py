"""What a checkpoint of ours holds: its fields, all of them, in one place, and what each must be."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from utils.errors import UserError

REMEDY = "take another checkpoint (previous.pth is an earlier one), or start from its weights with --pretrained"
MOST_STEPS, MOST_CLASSES = 10**12, 10**6
LOG_FILES = ("log.txt", "metrics.jsonl", "skipped_images.txt", "tensorboard")
"""The files of a results folder that lines are added to, and of which a checkpoint may hold lines."""


class Field(NamedTuple):
    """What a field must be, in words and as a question.

    ``needed`` is a field without which no run can carry on; ``carried`` one that only the part of the run that has
    written it understands, and gets back.
    """

    expected: str
    holds: Callable[[Any], bool]
    needed: bool = False
    carried: bool = False


def _whole(low: int = 0, **role: bool) -> Field:
    return Field(
        f"a whole number from {low} to {MOST_STEPS:,}",
        lambda value: type(value) is int and low <= value <= MOST_STEPS,
        **role,
    )


def _number(low: float, high: float) -> Field:
    return Field(f"a number from {low} to {high}", lambda value: type(value) in (int, float) and low <= value <= high)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _are_classes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_CLASSES
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _are_spans(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_CLASSES
        and all(isinstance(span, list) and len(span) == 3 and all(type(x) is int for x in span) for span in value)
        and all(0 <= span[0] <= MOST_STEPS and min(span[1:]) > 0 and max(span[1:]) <= MOST_STEPS for span in value)
        and value[0][0] == 0
        and all(one[0] < other[0] for one, other in pairwise(value))
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MOST_CLASSES and all(type(number) is int for number in value)


def _are_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(sums, Tensor) and sums.ndim == 1 and are_fractions(sums)
        for name, sums in value.items()
    )


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in ("total", "in_a_row") and isinstance(count, Tensor) and not count.ndim and are_fractions(count)
        for name, count in value.items()
    )


def _are_lines(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in LOG_FILES and isinstance(lines, str) and all(ord(letter) < 256 for letter in lines)
        for name, lines in value.items()
    )


def _is_best(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("model"), dict)
        and all(isinstance(weight, Tensor) for weight in value["model"].values())
        and all(_holds(FIELDS[name], value[name]) for name in value.keys() & FIELDS.keys() - {"model"})
    )


FIELDS = {
    # To carry on: engine.state has them
    "model": Field("a state dict", _is_state_dict, needed=True),
    "optimizer": Field("a dict", lambda value: True, needed=True),  # engine.validation looks at it
    "scaler": Field("a dict", lambda value: True, needed=True),
    "ema": Field("a state dict or None", lambda value: value is None or isinstance(value, dict)),
    "step": _whole(needed=True),
    "best": Field("a number", lambda value: type(value) in (int, float) and not math.isnan(value), needed=True),
    "evaluated_step": _whole(needed=True),
    "evaluations_since_best": _whole(),
    # To find out whether it may be carried on
    "config": Field("a text of settings", lambda value: isinstance(value, str), needed=True),
    "images": _whole(1, needed=True),
    "global_batch": _whole(1, needed=True, carried=True),
    "calendar": Field("epochs, steps and images of each of its parts", _are_spans),
    "classes": Field("a list of names, none of them twice", _are_classes),
    "category_ids": Field("a list of whole numbers, as many as classes", _are_ids),
    # What no file says yet
    "meters": Field("the sums of what the log has not told yet", _are_sums, carried=True),
    "skipped": Field("the counts of the steps that were skipped", _are_counts, carried=True),
    "skipped_images": _whole(carried=True),
    "owed": Field("lines that could not be written, by the names of their files", _are_lines, carried=True),
    "owed_best": Field("the best weights if they could not be written, or None", _is_best, carried=True),
    # For a reader; the best weights have their metrics besides
    "epoch": _whole(),
    "weights": Field("'model' or 'ema'", lambda value: value in ("model", "ema")),
    "top1": _number(0, 100),
    "top5": _number(0, 100),
    "loss": Field("a number", lambda value: type(value) in (int, float)),
}
NEEDED = tuple(name for name, field in FIELDS.items() if field.needed)
CARRIED = tuple(name for name, field in FIELDS.items() if field.carried)


def upgrade(content: dict[str, Any]) -> None:
    """Give the fields of an older checkpoint the names of today, in place."""
    if "best_top1" in content and "best" not in content:
        best = content.pop("best_top1")
        content["best"] = -math.inf if best == -1.0 else best  # which stood for no evaluation so far


def check_fields(content: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of ours with a field that is not what it should be.

    Raises:
        UserError: names the field, what was expected and what was found.
    """
    for name, field in FIELDS.items():
        if name in content and not _holds(field, content[name]):
            fail(path, name, field.expected, content[name])
    for name, limit in (("evaluated_step", "step"), ("global_batch", "images"), ("epoch", "step")):
        if name in content and limit in content and content[name] > content[limit]:
            fail(path, name, f"at most {limit} {content[limit]:,}", content[name])


def facts_of(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Step, metrics, classes and the like that a checkpoint gives, each as it should be.

    Files of others call other things by these names, which are passed over; in a file of ours they are errors.
    """
    if isinstance(content.get("config"), str):
        check_fields(content, path)
    known = {name: content[name] for name, field in FIELDS.items() if name in content and _holds(field, content[name])}
    return {name: value for name, value in known.items() if not isinstance(value, float) or math.isfinite(value)}


def _holds(field: Field, value: Any) -> bool:
    return not isinstance(value, Tensor) and field.holds(value)


def fail(path: str | Path, name: str, expected: str, found: Any) -> NoReturn:
    """Raise the error that says so."""
    raise UserError(f"{path} cannot be used: its {name} is {describe(found)}, expected {expected}; {REMEDY}")


def describe(value: Any) -> str:
    """Name a value in a few words, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, bool | float | None) or (isinstance(value, int) and abs(value) < 2**63):
        return repr(value)
    if isinstance(value, str):
        return f"{value[:40]!r}"
    number = f" of {len(value):,}" if isinstance(value, dict | list | tuple | set) else ""
    return f"a {type(value).__name__}{number}"


def dict_in(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The dict under a name; an empty one where there is none."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def are_fractions(value: Tensor) -> bool:
    """Whether a tensor holds plain numbers on the host, not whole ones."""
    return value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()
