"""What several benchmarks use: timing in turn, and what the figures were measured on."""

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

from utils.errors import UserError
from utils.machine import machine
from utils.tables import Table, show

Key = TypeVar("Key", bound=Hashable)


def in_turn(contenders: Mapping[Key, Callable[[], float | None]], repeats: int) -> dict[Key, list[float]]:
    """Run the contenders one after the other, ``repeats`` times, so that what disturbs one disturbs the others.

    Returns:
        what each has returned, in this order; one that has returned None, for want of memory, is not in it.
    """
    figures: dict[Key, list[float]] = {key: [] for key in contenders}
    for repeat in range(repeats):
        for number, key in enumerate(list(figures), 1):
            show_progress(f"round {repeat + 1}/{repeats}, {number}/{len(figures)}  {key}")
            figure = contenders[key]()
            if figure is None:
                del figures[key]
            else:
                figures[key].append(figure)
    show_progress("")
    return figures


def show_progress(text: str) -> None:
    """Write over the text before, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def ratio(a: list[float], b: list[float]) -> float:
    """Divide ``a`` by ``b`` round by round and take the median."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def spread(values: list[float]) -> str:
    """Halve the range from the smallest to the largest, as a share of the median."""
    return f"{50 * (max(values) - min(values)) / statistics.median(values):.0f} %"


def rounded(value: float) -> str:
    """Write at least three digits: 1,234 or 123 or 12.3 or 1.23."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def start_report(arguments: Namespace) -> dict:
    """Begin what ``benchmark_WHAT.json`` will hold."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    return {"what": arguments.what, "date": date.today().isoformat(), "machine": machine(), "settings": settings}


def finish_report(report: dict, tables: Sequence[Table], folder: Path) -> None:
    """Show the tables, and write ``benchmark_WHAT.json`` into ``folder``."""
    path = folder / f"benchmark_{report['what']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    show(*tables, ", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"figures in {path}")


def make_folder(folder: Path) -> None:
    """Create the folder for the figures, if need be.

    Raises:
        UserError: nothing can be written there; better known before an hour of measuring.
    """
    probe = folder / ".benchmark"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {error.strerror}") from error
