"""A page about one run or several, in one file that needs no network."""

import base64
import csv
import hashlib
import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from PIL import Image

from reports.charts import COLOURS, curves_of, draw_calibration, draw_svg
from reports.results import FACTS, METRICS, Results, differing, facts_of, in_words, known, number, read_table, shown
from utils.errors import UserError

HERE = Path(__file__).parent
MOST_CLASSES = 30
"""Of a matrix with numbers; of more the pairs that are confused most are told."""
SMALL = 100
"""Pixels of the longer side; a smaller picture is not blurred when it is enlarged."""

PICTURES = {"lowest.png": "Images with the lowest IoU", "worst.png": "Images with the most errors"}
"""That the evaluation of a dense task draws."""


class Cell(NamedTuple):
    """Text of a table, by what it is sorted if that is a number, and the colour of a run."""

    text: str
    value: float | None = None
    colour: str = ""


def write_page(runs: list[Results], defaults: dict[str, Any]) -> str:
    """Write the page as HTML.

    Args:
        defaults: the values of all settings where a run has none of its own, by their full names.

    Raises:
        UserError: what an evaluation has written is damaged.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        (HERE / "page.html").read_text(encoding="utf-8")
    )
    single = runs[0] if len(runs) == 1 else None
    facts = [facts_of(run) for run in runs]
    told = known(facts)
    return template.render(
        title=runs[0].name if single else f"{len(runs)} runs",
        runs=runs,
        colour=colour,
        tiles=[
            (f"best {facts[0]['metric']}" if name == "best" else FACTS[name], fact_cell(name, facts[0]))
            for name in told
            if name not in ("run", "metric")
        ],
        fact_heads=[FACTS[name] for name in told],
        fact_rows=[
            [fact_cell(name, of_run)._replace(colour=colour(i) if name == "run" else "") for name in told]
            for i, of_run in enumerate(facts)
        ],
        charts={axis: drawn for axis in ("step", "hours") if (drawn := draw_charts(runs, axis))},
        has_average=any(run.of("ema") for run in runs),
        setting_heads=["setting", *(["default", "here"] if single else [run.name for run in runs])],
        settings=[[Cell(text) for text in row] for row in settings_of(runs, defaults)],
        pictures=[first_batch(single)] if single and (single.folder / "first_batch.png").is_file() else [],
        reports=[read_report(single, *report) for report in single.reports().items()] if single else [],
        missing=missing_report(single) if single else "",
        script=script,
        script_hash=f"sha256-{digest}",
    )


def colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def fact_cell(name: str, facts: dict[str, Any]) -> Cell:
    value = facts[name]
    return Cell(in_words(name, value), None if isinstance(value, str) else value)


def draw_charts(runs: list[Results], axis: str) -> dict[str, str]:
    return {title: draw_svg(title, curves, axis) for title, curves in curves_of(runs, axis).items()}


def settings_of(runs: list[Results], defaults: dict[str, Any]) -> list[list[str]]:
    if len(runs) > 1:
        return [[name, *values] for name, values in differing(runs)]
    pairs = [(name, shown(defaults.get(name)), shown(value)) for name, value in runs[0].settings.items()]
    return [[name, default, here] for name, default, here in pairs if default != here]


def first_batch(run: Results) -> dict[str, str]:
    return {
        "title": "The first batch",
        "about": "As the network saw it, after augmentation and mixing.",
        "source": picture(run.folder / "first_batch.png"),
    }


def missing_report(run: Results) -> str:
    """The command that makes what the page has no file for."""
    best = run.folder / "checkpoints" / "best.pth"
    if run.reports() or not best.is_file():
        return ""
    return shlex.join(
        ["python", "main.py", "--cfg", str(run.folder / "config.yaml"), "--eval", "--report", "--resume", str(best)]
    )


def picture(path: Path) -> str:
    kind = {".jpg": "jpeg"}.get(path.suffix, "png")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


# ---- what an evaluation has written


def read_report(run: Results, weights: str, folder: Path) -> dict[str, Any]:
    """What ``--eval --report`` has written of these weights, for the template.

    Raises:
        UserError: a file of it is damaged, or still being written.
    """
    try:
        return {"weights": weights, "of": described(run.checked.get(weights, {})), **report_of(folder)}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise UserError(f"{folder} cannot be read ({error}); evaluate again with --eval --report") from error


def described(checked: dict) -> str:
    """What the evaluation was of, and what it came to, from its line in ``metrics.jsonl``."""
    if not checked:
        return ""
    measured = {title: value for name, title in METRICS.items() if (value := number(checked.get(name))) is not None}
    step = f" after step {checked['step']:,}" if number(checked.get("step")) is not None else ""
    figures = ", ".join(f"{title} {value:.2f} %" for title, value in measured.items())
    return f"Of {checked['checkpoint']}{step}: {figures}, on {checked.get('images', 0):,} images."


def report_of(folder: Path) -> dict[str, Any]:
    classes, matrix = read_table(folder / "per_class.csv"), read_table(folder / "confusion_matrix.csv")
    bins = [(float(c), float(a), float(n)) for c, a, n in read_table(folder / "calibration.csv")[1:]]
    found: dict[str, Any] = {
        "class_heads": classes[0],
        "classes": [[Cell(row[0]), *map(cell_of, row[1:])] for row in classes[1:]],
        "unit": classes[0][1],
        "pictures": [
            {"title": title, "source": picture(folder / name)}
            for name, title in PICTURES.items()
            if (folder / name).is_file()
        ],
        **(confusions(matrix) if matrix else {}),
    }
    if bins:
        found["calibration"] = draw_calibration(bins)
        found["error"] = 100 * sum(n * abs(a - c) for c, a, n in bins) / sum(n for *_, n in bins)
    if mistakes := read_table(folder / "mistakes.csv")[1:]:
        drawn = [(folder / "mistakes" / f"{place:04d}.jpg", row) for place, row in enumerate(mistakes, start=1)]
        found["mistakes"] = [mistake(path, row) for path, row in drawn if path.is_file()]
        found["mistaken"] = (
            f"{len(mistakes):,} in all; these are the {len(found['mistakes'])} of which it is surest. "
            "A click enlarges; mistakes.csv has the others."
        )
    return found


def cell_of(text: str) -> Cell:
    """A cell of a CSV file, which is a number if it looks like one."""
    try:
        value = float(text)
    except ValueError:
        return Cell(text)
    if not math.isfinite(value):
        return Cell(text)
    return Cell(text if value.is_integer() else f"{value:.4f}", value)


def confusions(table: list[list[str]]) -> dict[str, Any]:
    """The matrix with its numbers, or the pairs that are confused most where it is large."""
    heads, rows = table[0][1:], [(row[0], [float(text) for text in row[1:]]) for row in table[1:]]
    if len(heads) > MOST_CLASSES:
        pairs = [
            (n, true, answer) for true, row in rows for answer, n in zip(heads, row, strict=True) if true != answer
        ]
        worst = sorted((pair for pair in pairs if pair[0]), key=lambda pair: -pair[0])[:MOST_CLASSES]
        return {"confused": [[Cell(true), Cell(answer), Cell(f"{n:,.0f}", n)] for n, true, answer in worst]}
    return {
        "matrix_heads": heads,
        "matrix": [
            (name, [(f"{n:,.0f}" if n else "", f"{n / max(1, sum(row)):.3f}") for n in row]) for name, row in rows
        ],
    }


def mistake(path: Path, row: list[str]) -> dict[str, Any]:
    """A picture of the gallery: image, class, answer, confidence, as mistakes.csv has them."""
    name, true, answer, confidence = row
    with Image.open(path) as image:
        small = max(image.size) < SMALL
    return {
        "name": "/".join(Path(name).parts[-2:]),
        "true": true,
        "answer": answer,
        "confidence": f"{100 * float(confidence):.1f} %",
        "small": small,
        "source": picture(path),
    }
