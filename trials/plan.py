"""Which runs there are: a small YAML file says what is to vary."""

import itertools
import json
import math
import random
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from config import Config
from reports.results import METRICS
from utils.errors import UserError, did_you_mean
from utils.randomness import derive_seed

WAYS = ("variants", "grid", "random", "tpe", "gp", "cmaes", "qmc")
"""How trials are chosen: as the file names them, every combination, at random, or by a sampler of Optuna's."""
PRUNERS = ("none", "median", "hyperband")
RANGE = {"from", "to", "log", "whole"}


class Trial(NamedTuple):
    """Runs with the same settings, one for each seed."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the file says.

    Attributes:
        flags: of main.py, for all runs.
        by: one of :data:`WAYS`.
        settings: what varies: a list of values, or a dict with ``from`` and ``to``, perhaps ``log`` and ``whole``.
        variants: names of trials, and their settings.
        count: how many trials there are, where they are drawn.
        seeds: each trial is run with each of them.
        metric: by which trials are compared; empty for what decides which weights are the best.
        reach: a value of it, to which the time is told.
        pruner: of Optuna's, which ends a trial that does not look promising.
        seed: of what is drawn.
        processes: of each run.
    """

    flags: list[str]
    by: str
    settings: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    count: int = 20
    seeds: tuple[int, ...] = (0,)
    metric: str = ""
    reach: float = math.nan
    pruner: str = "none"
    seed: int = 0
    processes: int = 1

    @property
    def is_drawn_by_optuna(self) -> bool:
        return self.by in WAYS[3:]

    def trials(self) -> list[Trial]:
        """List the trials, where they do not depend on how others go."""
        if self.by == "variants":
            return [Trial(name, settings) for name, settings in self.variants.items()]
        if self.by == "grid":
            combinations = itertools.product(*self.settings.values())
            return [
                Trial(f"trial_{i:03d}", dict(zip(self.settings, values, strict=True)))
                for i, values in enumerate(combinations)
            ]
        return [Trial(f"trial_{i:03d}", self.draw(i)) for i in range(self.count)]

    def draw(self, number: int) -> dict[str, Any]:
        """Draw the settings of a trial at random: a function of the file's seed and the number."""
        generator = random.Random(derive_seed(self.seed, "trial", number))
        drawn: dict[str, Any] = {}
        for key, what in self.settings.items():
            if isinstance(what, list):
                drawn[key] = generator.choice(what)
                continue
            low, high = what["from"], what["to"]
            if what.get("log"):
                value = math.exp(generator.uniform(math.log(low), math.log(high)))
                drawn[key] = round(value) if what.get("whole") else value
            else:
                drawn[key] = generator.randint(low, high) if what.get("whole") else generator.uniform(low, high)
        return drawn


def words_of(settings: dict[str, Any]) -> list[str]:
    """Write settings as they follow ``--opts``."""
    return [
        word
        for key, value in settings.items()
        for word in (key, value if isinstance(value, str) else json.dumps(value))
    ]


def read_plan(path: Path) -> Plan:
    """Read the file.

    Raises:
        UserError: it cannot be read, or something in it is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is to say what varies, for example {{flags: ..., settings: {{TRAIN.BASE_LR: [...]}}}}")
    known = ("flags", "by", "settings", "variants", "count", "seeds", "metric", "reach", "pruner", "seed", "processes")
    for key in content:
        if key not in known:
            raise UserError(f"{path}: unknown {key}{did_you_mean(str(key), known)}; it may have {', '.join(known)}")

    def refuse(problem: str) -> UserError:
        return UserError(f"{path}: {problem}")

    variants, settings = content.get("variants") or {}, content.get("settings") or {}
    if not isinstance(variants, dict):
        raise refuse("variants is to be a dict of names and their settings, for example {plain: {}}")
    by = content.get("by", "variants" if variants else "grid")
    if by not in WAYS:
        raise refuse(f"by {by} is not one of {', '.join(WAYS)}{did_you_mean(str(by), WAYS)}")
    if (by == "variants") != bool(variants) or bool(settings) == bool(variants):
        raise refuse("say either variants (names of trials, each with its settings), or settings (what each may be)")
    for name, of_variant in variants.items():
        if not re.fullmatch(r"[^/\\.][^/\\]*", str(name)):
            raise refuse(f"variant {name!r} is to be a name for a folder")
        if not isinstance(of_variant, dict | None):
            raise refuse(f"variant {name} is to be a dict of settings, {{}} for none")
        check_keys(path, of_variant or {})
    check_keys(path, settings)
    for key, what in settings.items():
        check_range(path, key, what, by)
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise refuse(f"seeds {seeds} is to be a list of whole numbers, for example [0, 1, 2]")
    for key in ("count", "processes"):
        if type(content.get(key, 1)) is not int or content.get(key, 1) < 1:
            raise refuse(f"{key} {content[key]} is to be a whole number from 1")
    if content.get("pruner", "none") not in PRUNERS:
        raise refuse(f"pruner {content['pruner']} is not one of {', '.join(PRUNERS)}")
    if content.get("metric", next(iter(METRICS))) not in METRICS:
        raise refuse(f"metric {content['metric']} is not one of {', '.join(METRICS)}")
    if not isinstance(content.get("reach", 0), int | float):
        raise refuse(f"reach {content['reach']} is to be a number: a value of the metric")
    try:
        flags = shlex.split(content["flags"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refuse("flags is to say what main.py is started with, for example --cfg FILE --data-path DIR") from error
    return Plan(
        flags,
        by,
        settings,
        {str(name): of_variant or {} for name, of_variant in variants.items()},
        content.get("count", 20),
        tuple(seeds),
        content.get("metric", ""),
        float(content.get("reach", math.nan)),
        content.get("pruner", "none"),
        content.get("seed", 0),
        content.get("processes", 1),
    )


def check_keys(path: Path, settings: Any) -> None:
    """Refuse settings that there are not."""
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings is to be a dict, for example {{TRAIN.BASE_LR: [1.0e-4, 1.0e-3]}}")
    known = Config.settings()
    for key in settings:
        if key not in known:
            raise UserError(f"{path}: unknown setting {key}{did_you_mean(str(key), known)}")
        if key in ("SEED", "TAG", "OUTPUT"):
            raise UserError(f"{path}: {key} is each run's own; seeds says which seeds there are")


def check_range(path: Path, key: str, what: Any, by: str) -> None:
    """Refuse what no value can be drawn from."""
    if isinstance(what, list) and what:
        return
    if not isinstance(what, dict) or not {"from", "to"} <= what.keys() or what.keys() - RANGE:
        raise UserError(f"{path}: {key} is to be a list of values, or {{from: LEAST, to: LARGEST, log: True}}")
    if by == "grid":
        raise UserError(f"{path}: {key} has a range, and a grid takes lists; say by: random, or one of {WAYS[3:]}")
    low, high = what["from"], what["to"]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high))
    if not numbers or low >= high or (what.get("log") and low <= 0):
        raise UserError(f"{path}: {key} from {low} to {high} is no range; with log it is to begin above 0")
    if what.get("whole") and not (type(low) is type(high) is int):
        raise UserError(f"{path}: {key} is to be whole, and its range from {low} to {high} is not")
