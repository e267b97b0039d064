"""What several benchmarks use: timing in turn, what the figures were measured on, tables and files."""

import json
import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Hashable, Mapping
from datetime import date
from pathlib import Path
from typing import TypeVar

import timm
import torch
import torchvision
from rich import box
from rich.console import Console
from rich.table import Table

from utils.errors import UserError

Key = TypeVar("Key", bound=Hashable)


def in_turn(contenders: Mapping[Key, Callable[[], float | None]], repeats: int) -> dict[Key, list[float]]:
    """What each contender returns, ``repeats`` times, all of them in turn: so what disturbs one disturbs the others.

    One that returns None is out, and its figures with it.
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
    """On a terminal, in place of the text before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def within_memory(run: Callable[[], float]) -> float | None:
    """What ``run`` returns, or None when memory does not suffice for it."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # so says the CPU's allocator
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # here, where the error no longer holds on to what was computed
    return None


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most of the GPU's memory that ``run`` has at a time, on top of what was there before."""
    run()  # work space of libraries stays for good
    synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def ratio(a: list[float], b: list[float]) -> float:
    """How many times ``b`` is ``a``: the median over the rounds in which both were measured."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def spread(values: list[float]) -> str:
    """Half of the range from the smallest to the largest, as a share of the median."""
    return f"{50 * (max(values) - min(values)) / statistics.median(values):.0f} %"


def rounded(value: float) -> str:
    """With three digits at least: 1,234 or 123 or 12.3 or 1.23."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def table(title: str, *columns: str) -> Table:
    """An empty table; its first column is text, the others are numbers."""
    made = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    return made


def show(*shown: Table | str) -> None:
    """On the terminal; 100 columns wide where that is not one."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for item in shown:
        console.print(item, highlight=False)


def start_report(arguments: Namespace, device: torch.device) -> dict:
    """What the JSON file of every benchmark has."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    return {
        "what": arguments.what, "date": date.today().isoformat(), "machine": machine(device), "settings": settings,
    }  # fmt: skip


def write_report(report: dict, folder: Path) -> None:
    """As ``benchmark_WHAT.json`` in ``folder``."""
    path = folder / f"benchmark_{report['what']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    show(", ".join(f"{key} {value}" for key, value in report["machine"].items()), f"figures in {path}")


def make_folder(folder: Path) -> None:
    """Raises: UserError: nothing can be written there; better known before an hour of measuring."""
    probe = folder / ".benchmark"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {error.strerror}") from error


def this_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU",
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def cpu_name() -> str:
    """As Linux tells it; elsewhere the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
