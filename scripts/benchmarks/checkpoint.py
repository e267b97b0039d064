"""How long saving a checkpoint keeps training waiting."""

import argparse
import json
import shutil
import statistics
from datetime import date

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from engine.checkpoints import Checkpoints
from scripts.benchmarks.common import machine, seconds, show_progress
from utils.checkpoint import save_atomically


def benchmark_checkpoint(arguments: argparse.Namespace) -> None:
    """A loop of steps alone, the same with a save in it, and a save that the loop would wait for."""
    torch.set_num_threads(1)  # the thread that writes needs a core
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parts = max(1, arguments.megabytes // 2)
    content = {"model": {f"weight {i}": torch.randn(500_000, device=device) for i in range(parts)}}
    folder = arguments.output / "benchmark_checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save_last(content)  # allocates the memory that all later saves use
    checkpoints.finish()
    figures: dict[str, list[float]] = {"blocking save": [], "loop": [], "loop with a save": [], "copy alone": []}
    for repeat in range(arguments.repeats):
        show_progress(f"{repeat + 1}/{arguments.repeats}")
        figures["blocking save"].append(seconds(lambda: save_atomically(content, folder / "blocking.pth")))
        steps = steps_of(2.5 * statistics.median(figures["blocking save"]), device)
        figures["loop"].append(seconds(lambda n=steps: loop(n, device)))
        figures["copy alone"].append(seconds(lambda: checkpoints.save_last(content)))
        checkpoints.finish()
        figures["loop with a save"].append(seconds(lambda n=steps: (checkpoints.save_last(content), loop(n, device))))
        checkpoints.finish()
    show_progress("")
    shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    lost = [b - a for a, b in zip(figures["loop"], figures["loop with a save"], strict=True)]
    share = statistics.median(lost) / medians["blocking save"]
    report = {"what": "checkpoint", "date": date.today().isoformat(), "machine": machine(device),
              "megabytes": arguments.megabytes, "seconds": figures, "share_of_blocking": share}  # fmt: skip
    table = Table(title=f"saving {arguments.megabytes} MB, fsync included", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("median s", justify="right")
    table.add_column("min - max", justify="right")
    for name, values in {**figures, "lost by the loop": lost}.items():
        table.add_row(name, f"{statistics.median(values):.3f}", f"{min(values):.3f} - {max(values):.3f}")
    Console().print(table)
    print(f"the loop loses {100 * share:.1f} % of the time of a blocking save")
    (arguments.output / "benchmark_checkpoint.json").write_text(json.dumps(report, indent=1) + "\n")


def loop(steps: int, device: torch.device) -> None:
    """Something like training steps."""
    x = torch.ones(512, 512, device=device)
    for _ in range(steps):
        x = (x @ x).tanh()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps_of(length: float, device: torch.device) -> int:
    """How many steps of :func:`loop` take so many seconds."""
    loop(20, device)
    return max(1, round(100 * length / seconds(lambda: loop(100, device))))
