"""How long saving a checkpoint keeps training waiting."""

import shutil
import statistics
from argparse import Namespace
from functools import partial

import torch

from benchmarks.common import finish_report, show_progress, start_report
from engine.checkpoints import Checkpoints
from utils.checkpoint import save_atomically
from utils.machine import this_device
from utils.tables import Table
from utils.timing import seconds


def benchmark_checkpoint(arguments: Namespace) -> None:
    """Time a loop of steps, the same with a save in it, and a save that the loop would wait for."""
    torch.set_num_threads(1)  # the thread that writes needs a core
    device = this_device()
    parts = max(1, arguments.megabytes // 2)
    content = {"model": {f"weight {i}": torch.randn(500_000, device=device) for i in range(parts)}}
    folder = arguments.output / "benchmark_checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save_last(content)  # allocates the memory that all later saves use
    checkpoints.finish()

    def loop(steps: int) -> None:
        """Compute something like training steps."""
        x = torch.ones(512, 512, device=device)
        for _ in range(steps):
            x = (x @ x).tanh()

    figures: dict[str, list[float]] = {"blocking save": [], "loop": [], "loop with a save": [], "copy alone": []}

    def save_and_loop(steps: int) -> None:
        checkpoints.save_last(content)
        loop(steps)

    for repeat in range(arguments.repeats):
        show_progress(f"{repeat + 1}/{arguments.repeats}")
        figures["blocking save"].append(seconds(lambda: save_atomically(content, folder / "blocking.pth")))
        loop(20)
        one = seconds(lambda: loop(100)) / 100
        steps = max(1, round(2.5 * statistics.median(figures["blocking save"]) / one))
        figures["loop"].append(seconds(partial(loop, steps)))
        figures["copy alone"].append(seconds(lambda: checkpoints.save_last(content)))
        checkpoints.finish()
        figures["loop with a save"].append(seconds(partial(save_and_loop, steps)))
        checkpoints.finish()
    show_progress("")
    shutil.rmtree(folder)
    report = start_report(arguments) | {"seconds": figures}
    finish_report(report, tables(report), arguments.output)


def tables(report: dict) -> list[Table]:
    """What each took, and what a save costs the loop."""
    figures = report["seconds"]
    lost = [b - a for a, b in zip(figures["loop"], figures["loop with a save"], strict=True)]
    share = statistics.median(lost) / statistics.median(figures["blocking save"])
    rows = [
        [name, f"{statistics.median(values):.3f}", f"{min(values):.3f} - {max(values):.3f}"]
        for name, values in {**figures, "lost by the loop": lost}.items()
    ]
    title = (
        f"Saving {report['settings']['megabytes']} MB, fsync included: the loop loses {100 * share:.1f} % of the time "
        "of a blocking save."
    )
    return [Table(title, ["", "median s", "min - max"], rows)]
