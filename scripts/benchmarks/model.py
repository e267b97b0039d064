"""Inference and training (forward and backward pass) of models side by side."""

import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from engine.model import begin_step, training_giga_macs
from engine.precision import Precision
from engine.throughput import TRAIN_STEP_MACS
from scripts.benchmarks import contenders, plot
from scripts.benchmarks.common import (
    in_turn,
    peak_bytes,
    ratio,
    rounded,
    seconds,
    show,
    show_progress,
    spread,
    start_report,
    synchronize,
    table,
    this_device,
    within_memory,
    write_report,
)
from utils.counting import count_kernels, moved_bytes, saved_bytes

KINDS = ("inference", "training")
SECONDS_PER_MEASUREMENT = 0.2
COPIED_BYTES = 1 << 28
MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass
class Contender:
    """A model on its device, and what it does with a batch."""

    name: str
    model: nn.Module
    precision: Precision
    gmac: float
    training_gmac: dict[int, float]  # by batch size
    kernels: dict[str, int] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)

    def prepare(self, kind: str) -> None:
        """Go into the mode that ``kind`` of work needs."""
        self.model.train(kind == "training")

    def run(self, kind: str, images: torch.Tensor, targets: torch.Tensor) -> None:
        """``inference`` or ``training`` of a batch."""
        begin_step(self.model)
        if kind == "inference":
            with torch.inference_mode(), self.precision.autocast():
                self.model(images)
            return
        try:
            self.loss(images, targets).backward()
        finally:
            self.model.zero_grad()

    def loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self.precision.autocast():
            return F.cross_entropy(self.model(images), targets)


def benchmark_model(arguments: Namespace) -> None:
    """Images per second, memory, kernels and TFLOP/s of every model at every batch size."""
    device = this_device()
    precision = contenders.precision_of(arguments.precision, device)
    defaults = contenders.DEFAULT_ON_GPU if device.type == "cuda" else contenders.DEFAULT_ON_CPU
    arguments.models = arguments.models or list(defaults)
    arguments.batch_sizes = sorted(set(arguments.batch_sizes or ([1, 64, 256] if device.type == "cuda" else [1, 4])))
    contenders.check_names(arguments.models)
    racing = [prepare(name, arguments, precision) for name in arguments.models]
    batches = {n: contenders.synthetic_batch(n, arguments.image_size, device) for n in arguments.batch_sizes}

    runs: dict[tuple, Callable[[], float | None]] = {}
    memory: dict[tuple, float | None] = {}
    for n, batch in batches.items():
        for kind in KINDS:
            for one in racing:
                show_progress(f"warming up {one.name}, {kind}, batch {n}")
                memory[one.name, n, kind] = memory_of(one, kind, batch, arguments.compile != "none")
                runs[one.name, n, kind] = measurement(one, kind, batch)
    if arguments.compile == "none":
        for one in racing:
            count_traffic(one, batches[arguments.batch_sizes[-1]])
    runs["matmul"], runs["copy"] = matrix_product(precision), copying(device)
    figures = in_turn(runs, arguments.repeats)
    report = start_report(arguments, device) | {
        "precision": precision.name,
        "matmul_tflops": figures.pop("matmul"),
        "copy_gb_per_second": figures.pop("copy"),
        "models": [
            {
                "name": one.name,
                "parameters": sum(p.numel() for p in one.model.parameters()),
                "gmac": one.gmac,
                "kernels": one.kernels,
                "moved_bytes": one.moved_bytes,
                "batches": [
                    {
                        "batch_size": n,
                        "training_gmac": one.training_gmac[n],
                        **{
                            kind: {
                                "images_per_second": figures.get((one.name, n, kind)),
                                "memory_bytes": memory[one.name, n, kind],
                            }
                            for kind in KINDS
                        },
                    }
                    for n in batches
                ],
            }
            for one in racing
        ],
    }
    show(*tables(report))
    plot.draw_models(report, arguments.output / "benchmark_model.png")
    write_report(report, arguments.output)


def prepare(name: str, arguments: Namespace, precision: Precision) -> Contender:
    """Create the model, count what it launches for one image, and compile it if that is asked for."""
    show_progress(f"creating {name}")
    device = precision.device
    gmac = contenders.count_gmac(name.removeprefix(contenders.PLAIN), arguments.image_size)
    torch.manual_seed(0)
    model = contenders.create(name, arguments.image_size)
    training = {n: training_giga_macs(model, arguments.image_size, n) for n in arguments.batch_sizes}
    made = Contender(name, model.to(device, memory_format=torch.channels_last), precision, gmac, training)
    if arguments.compile == "none":
        batch = contenders.synthetic_batch(1, arguments.image_size, device)
        for kind in KINDS:
            made.prepare(kind)
            made.kernels[kind] = count_kernels(lambda kind=kind: made.run(kind, *batch), device)
    contenders.compile_model(model, arguments.compile)
    return made


def memory_of(one: Contender, kind: str, batch: tuple, compiled: bool) -> float | None:
    """The peak on a GPU, weights included; on a CPU, what an eager training step keeps for the backward pass.

    None where there is no such figure, or not memory enough.
    """
    one.prepare(kind)
    if one.precision.device.type == "cuda":
        weights = sum(t.nbytes for t in one.model.state_dict().values())
        return within_memory(lambda: weights + peak_bytes(lambda: one.run(kind, *batch), one.precision.device))
    if kind == "inference" or compiled:
        return None
    return within_memory(lambda: saved_bytes(lambda: one.loss(*batch), one.model.parameters()))


def count_traffic(one: Contender, batch: tuple) -> None:
    """What its kernels read and write, where there is memory for the batch."""
    for kind in KINDS:
        one.prepare(kind)
        moved = within_memory(lambda kind=kind: moved_bytes(lambda: one.run(kind, *batch)))
        if moved:
            one.moved_bytes[kind] = moved


def measurement(one: Contender, kind: str, batch: tuple) -> Callable[[], float | None]:
    """A function that returns images/s, or None when memory does not suffice."""
    images, targets = batch

    def measure() -> float:
        one.prepare(kind)
        one.run(kind, images, targets)  # the first run after a change of mode fills caches
        synchronize()
        once = seconds(lambda: one.run(kind, images, targets))
        times = int(SECONDS_PER_MEASUREMENT / once)
        if not times:
            return len(images) / once
        return times * len(images) / seconds(lambda: [one.run(kind, images, targets) for _ in range(times)])

    return lambda: within_memory(measure)


def matrix_product(precision: Precision) -> Callable[[], float]:
    """A function that returns the TFLOP/s of the product of two large square matrices."""
    n = MATRIX_SIZE[precision.device.type]
    a, b = (torch.randn(n, n, device=precision.device, dtype=precision.dtype) for _ in range(2))
    a @ b
    times = max(1, int(SECONDS_PER_MEASUREMENT / seconds(lambda: a @ b)))
    return lambda: times * 2 * n**3 / 1e12 / seconds(lambda: [a @ b for _ in range(times)])


def copying(device: torch.device) -> Callable[[], float]:
    """A function that returns GB/s, read and written, of copying a large tensor."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    times = max(1, int(SECONDS_PER_MEASUREMENT / seconds(lambda: target.copy_(source))))
    return lambda: times * 2 * COPIED_BYTES / 1e9 / seconds(lambda: [target.copy_(source) for _ in range(times)])


def tflops(model: dict, kind: str, batch: dict) -> float:
    """Achieved by the median."""
    return gflop(model, kind, batch) * statistics.median(batch[kind]["images_per_second"]) / 1e3


def gflop(model: dict, kind: str, batch: dict) -> float:
    """Of one image; 2 operations for each multiply-accumulate."""
    return 2 * (TRAIN_STEP_MACS * batch["training_gmac"] if kind == "training" else model["gmac"])


def tables(report: dict) -> list:
    """Images per second, and what lies behind them."""
    settings, on_gpu = report["settings"], report["machine"]["device"] != "no GPU"
    size, by_name = settings["image_size"], {model["name"]: model for model in report["models"]}
    speed = table(
        f"{size} x {size}, {report['precision']}, channels last, compile {settings['compile']}; "
        f"medians of {settings['repeats']}",
        "images/s", "batch", "inference", "+-", "x plain", "training", "+-", "x plain", "MB" if on_gpu else "MB saved",
    )  # fmt: skip
    for i, n in enumerate(settings["batch_sizes"]):
        for model in report["models"]:
            other = by_name.get(contenders.PLAIN + model["name"])
            row, batch = [model["name"], f"{n:,}"], model["batches"][i]
            for kind in KINDS:
                values = batch[kind]["images_per_second"]
                if values is None:
                    row += ["no memory", "", ""]
                    continue
                against = other["batches"][i][kind]["images_per_second"] if other else None
                row += [
                    rounded(statistics.median(values)), spread(values),
                    f"{ratio(values, against):.2f}" if against else "",
                ]  # fmt: skip
            taken = batch["training"]["memory_bytes"]
            speed.add_row(*row, rounded(taken / 1e6) if taken else "")
        speed.add_section()
    rate = statistics.median(report["matmul_tflops"])
    batch_sizes = settings["batch_sizes"]
    work = table(
        f"kernels of one image; TFLOP/s at batch {batch_sizes[-1]:,}, and their share of the {rate:.3g} TFLOP/s "
        "that a matrix product reaches",
        "", "M params", "GMAC", "kernels", "training", "TFLOP/s", "share", "training", "share",
    )  # fmt: skip
    for model in report["models"]:
        row = [model["name"], f"{model['parameters'] / 1e6:.1f}", f"{model['gmac']:.3g}"]
        row += [f"{model['kernels'][kind]:,}" if model["kernels"] else "" for kind in KINDS]
        for kind in KINDS:
            if model["batches"][-1][kind]["images_per_second"] is None:
                row += ["no memory", ""]
                continue
            achieved = tflops(model, kind, model["batches"][-1])
            row += [f"{achieved:.3g}", f"{100 * achieved / rate:.1f} %"]
        work.add_row(*row)
    return [speed, work, *([floor_table(report)] if any(m["moved_bytes"] for m in report["models"]) else [])]


def floors(report: dict, model: dict, kind: str) -> tuple[float, float, float]:
    """Milliseconds of a batch of the largest size: of its products, of what is moved, and as measured."""
    batch = model["batches"][-1]
    products = gflop(model, kind, batch) * batch["batch_size"] / statistics.median(report["matmul_tflops"])
    moved = model["moved_bytes"][kind] / 1e6 / statistics.median(report["copy_gb_per_second"])
    return products, moved, 1e3 * batch["batch_size"] / statistics.median(batch[kind]["images_per_second"])


def floor_table(report: dict) -> Table:
    """A batch's products at the rate of a large one; what its own eager kernels read and write; what was measured.

    No implementation beats the first. The second gets smaller where kernels are fused or find things in a cache.
    """
    bandwidth, n = statistics.median(report["copy_gb_per_second"]), report["settings"]["batch_sizes"][-1]
    shown = table(
        f"batch {n:,}, ms: products at that rate, bytes at {rounded(bandwidth)} GB/s (a copy), measured",
        "", "products", "bytes", "inference", "products", "bytes", "training",
    )  # fmt: skip
    for model in report["models"]:
        row = [model["name"]]
        for kind in KINDS:
            known = model["batches"][-1][kind]["images_per_second"] and kind in model["moved_bytes"]
            row += map(rounded, floors(report, model, kind)) if known else ["", "", ""]
        shown.add_row(*row)
    return shown
