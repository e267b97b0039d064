"""What a results folder tells of its run."""

import csv
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

METRICS = {
    "top1": "top-1", "top5": "top-5", "miou": "mIoU", "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy", "box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP",
}  # fmt: skip
"""In percent, of an evaluation; the first one that it has decides which weights are the best."""

WEIGHTS = {"model": "", "ema": " (EMA)"}
"""Whose evaluation it is, in words after the metric's name."""


@dataclass(frozen=True)
class Results:
    """The run of a results folder.

    Attributes:
        name: that tells it from others, as short as can be.
        settings: by their full names, ``TRAIN.EPOCHS``, as its config.yaml has them.
        starts, train, evaluations: the lines of ``metrics.jsonl``, with ``hours`` of training since the run began if
            all tell the time; the evaluations are those during training, the starts those that a step followed.
        checked: the last evaluation of a file with these weights, ``model`` or ``ema``, by ``--eval``.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    starts: list[dict]
    train: list[dict]
    evaluations: list[dict]
    checked: dict[str, dict]

    @property
    def measured(self) -> list[str]:
        """The metrics that its evaluations have, the decisive one first."""
        return [metric for metric in METRICS if any(number(e.get(metric)) is not None for e in self.evaluations)]

    def of(self, weights: str) -> list[dict]:
        """Its evaluations of these weights."""
        return [e for e in self.evaluations if e.get("weights") == weights]

    def reports(self) -> dict[str, Path]:
        """The folders that ``--eval --report`` has written, by whose weights they are."""
        folders = {weights: self.folder / f"report_{weights}" for weights in WEIGHTS}
        return {weights: folder for weights, folder in folders.items() if (folder / "per_class.csv").is_file()}


def read_runs(folders: list[Path]) -> tuple[list[Results], list[str]]:
    """Read the runs of these folders, and say which of the folders have none.

    Raises:
        UserError: none of them has one, or one cannot be read.
    """
    runs, missing = [], []
    for folder, name in zip(folders, names_of(folders), strict=True):
        try:
            runs.append(read_run(folder, name))
        except NoRun as error:
            missing.append(str(error))
    if not runs:
        raise UserError(missing[0])
    return runs, missing


class NoRun(UserError):
    """A folder without a run that has begun to train."""


def read_run(folder: Path, name: str) -> Results:
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.is_file():
        raise NoRun(f"{metrics} is not there; give the results folder of a run (OUTPUT/MODEL.NAME/TAG)")
    try:
        events = with_hours(list(json_lines(metrics)))
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    during = [e for e in events if "checkpoint" not in e and number(e.get("step")) is not None]
    train, evaluations = ([e for e in during if e.get("event") == kind] for kind in ("train", "eval"))
    if not train:
        raise NoRun(f"{metrics} has no line about training yet")
    follows = itertools.pairwise(during)
    starts = [e for e, then in follows if e.get("event") == "start" and then.get("event") != "start"]
    checked = {e.get("weights", ""): e for e in events if e.get("event") == "eval" and "checkpoint" in e}
    return Results(folder, name, dict(flat(settings)), starts, train, evaluations, checked)


def names_of(folders: list[Path]) -> list[str]:
    """The last two parts of each path, or as many as tell it from the others."""
    paths = [folder.absolute() for folder in folders]
    names = [str(path) for path in paths]
    for count in range(2, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len({*names}) == len({*paths}):
            break
    return names


def json_lines(path: Path) -> Iterator[dict]:
    """The lines of a file that are whole; a run may be writing the last one."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            yield values


def with_hours(events: list[dict]) -> list[dict]:
    """Add to each line how long the run had been training; the time between two starts does not count."""
    if any(number(event.get("time")) is None for event in events if event.get("event") == "train"):
        return events  # an earlier version wrote some of them
    hours, last, found = 0.0, None, []
    for event in events:
        now = number(event.get("time"))
        if now is not None and "checkpoint" not in event:
            if event.get("event") != "start" and last is not None:
                hours += max(0.0, now - last) / 3600
            last, event = now, {**event, "hours": hours}
        found.append(event)
    return found


def flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config file by their full names."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict) and not str(key).endswith("KWARGS"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else is there."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fits else None


def facts_of(run: Results) -> dict[str, Any]:
    """Sum a run up: a value, or None, for each key of :data:`FACTS`."""
    metric = next(iter(run.measured), None)
    scored = [e for e in run.evaluations if metric and number(e.get(metric)) is not None]
    best = max(scored, key=lambda e: e[metric], default={})
    of_model = [e for e in scored if e.get("weights") == "model"]
    last, evaluated = run.train[-1], run.of("model") or run.evaluations
    return {
        "run": run.name,
        "metric": METRICS.get(metric or ""),
        "best": best.get(metric),
        "best_step": best.get("step"),
        "best_weights": best.get("weights"),
        "last": of_model[-1][metric] if of_model and metric else None,
        "last_loss": number(evaluated[-1].get("loss")) if evaluated else None,
        "step": last["step"],
        "epoch": number(last.get("epoch")),
        "hours": max((e["hours"] for e in run.train + run.evaluations if "hours" in e), default=None),
        "images_per_second": middle(run, "images_per_second"),
        "data_wait": middle(run, "data_wait"),
        "memory_bytes": max((m for e in run.train if (m := number(e.get("memory_bytes"))) is not None), default=None),
        "skipped_images": number(last.get("skipped_images")),
        "skipped_steps": number(last.get("skipped_steps")),
        "processes": number(run.starts[-1].get("processes")) if run.starts else None,
        "restarts": len(run.starts) - 1 if run.starts else None,
    }


def middle(run: Results, name: str) -> float | None:
    """The median over the lines about training; half of a run's time went by faster."""
    values = [value for e in run.train if (value := number(e.get(name))) is not None]
    return statistics.median(values) if values else None


FACTS = {
    "run": "run", "metric": "metric", "best": "best", "best_step": "at step", "best_weights": "weights", "last": "last",
    "last_loss": "val. loss", "step": "steps", "epoch": "epochs", "hours": "hours", "images_per_second": "images/s",
    "data_wait": "data wait", "memory_bytes": "memory", "skipped_images": "bad images", "skipped_steps": "bad steps",
    "processes": "processes", "restarts": "restarts",
}  # fmt: skip
"""What :func:`facts_of` tells, and the heads of its columns."""

ONLY_IF_ANY = {"skipped_images", "skipped_steps"}
"""Facts that are not worth a column of zeros."""

FORMS = {
    "best": "{:.2f}", "last": "{:.2f}", "last_loss": "{:.4f}", "hours": "{:.2f}", "images_per_second": "{:,.0f}",
    "data_wait": "{:.1%}", "step": "{:,}", "best_step": "{:,}", "epoch": "{:,}",
}  # fmt: skip


def known(facts: list[dict[str, Any]]) -> list[str]:
    """The facts that there is something to tell of, of these runs."""
    return [name for name in FACTS if any(of[name] or (of[name] == 0 and name not in ONLY_IF_ANY) for of in facts)]


def in_words(name: str, value: Any) -> str:
    """A fact for a person."""
    if value is None:
        return "-"
    if name == "memory_bytes":
        return f"{value / 1e9:.1f} GB"
    return FORMS.get(name, "{}").format(value)


def differing(runs: list[Results]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, with the value of each; those of where results go are left out."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ("OUTPUT", "TAG"))
    rows = [(name, [shown(run.settings.get(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len({*values}) > 1]


def shown(value: Any) -> str:
    return "-" if value is None else str(value)


def read_table(path: Path) -> list[list[str]]:
    """The rows of a CSV file, the heads first; none where there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return [[cell.removeprefix("'") for cell in row] for row in csv.reader(file)]  # see utils.names.harmless
