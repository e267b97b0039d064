"""Inference and training of networks side by side."""

import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import common, contenders
from benchmarks.common import ratio, rounded, show_progress
from benchmarks.contenders import KINDS, PARTS, PLAIN, PLAIN_STEP, Contender
from benchmarks.plot import draw_models
from config import SETTINGS
from engine.memory import within_memory
from engine.model import training_giga_macs
from engine.throughput import TRAIN_STEP_MACS, none_if_unknown
from models.crossformer import VARIANTS
from models.heads import HEADS
from utils.compat import is_compiled
from utils.counting import count_kernels, moved_bytes
from utils.errors import UserError, did_you_mean
from utils.image_size import height_and_width
from utils.machine import copying, matrix_product, this_device
from utils.tables import Table

SWINS = {"swin_tiny": 4.5, "swin_small": 8.7, "swin_base": 15.4}
"""The published GMAC of each, to choose the one of similar size."""


def benchmark_model(arguments: Namespace) -> None:
    """Measure inference and training steps of networks at several batch sizes."""
    names = arguments.models or list(
        contenders.DEFAULT_ON_GPU if torch.cuda.is_available() else contenders.DEFAULT_ON_CPU
    )
    contenders.check_names(names)
    compiled = "" if arguments.compile == "none" else ", compiled"
    sizes = arguments.batch_sizes or ([1, 64, 256] if torch.cuda.is_available() else [1, 4])
    for name in names:
        if min(sizes) == 1 and contenders.head_of(name) == "upernet":
            raise UserError(f"--batch-sizes 1: {name} has BatchNorm over single values; give 2 or more")
    report = race([name + compiled for name in names], sorted(set(sizes)), KINDS, arguments)
    draw_models(report, arguments.output / "benchmark_model.png")
    common.finish_report(report, tables(report), arguments.output)


def benchmark_step(arguments: Namespace) -> None:
    """Measure training steps and their parts: eager, recomputing, plain, of a Swin, compiled."""
    names = arguments.models or ["crossformer_small"]
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--models: {name} is not a CrossFormer{did_you_mean(name, VARIANTS)}")
    contenders.check_names(names)
    sizes = arguments.batch_sizes or [256 if torch.cuda.is_available() else 4]
    report = race(lineup(names, arguments), sorted(set(sizes)), ("training",), arguments)
    common.finish_report(report, tables(report), arguments.output)


def lineup(names: list[str], arguments: Namespace) -> list[str]:
    """Say who takes part: each variant, as it is and recomputing, its plain form and a Swin; and these compiled."""
    everyone: dict[str, None] = {}
    for name in names:
        gmac = contenders.count_gmac(name, arguments.image_size)
        networks = name, PLAIN + name, min(SWINS, key=lambda swin: abs(SWINS[swin] - (gmac or 0)))
        ways = [f"{name}, recompute {how}" for how in SETTINGS["TRAIN.USE_CHECKPOINT"].choices[1:]]
        compiled = [f"{network}, compiled" for network in networks if arguments.compile != "none"]
        everyone |= dict.fromkeys([name, *ways, networks[1], f"{networks[1]}, {PLAIN_STEP}", networks[2], *compiled])
    return list(everyone)


def race(names: list[str], sizes: list[int], kinds: tuple[str, ...], arguments: Namespace) -> dict:
    """Measure each contender in each kind of work at each batch size, and what the device can do at best."""
    facts: list[dict[str, Any]] = []
    runs: dict[Any, Callable[[], float | None]] = {}
    for name in names:
        show_progress(f"counting {name}")
        one = contenders.make_contender(name, arguments)
        batches = {n: one.task.synthetic_batch(n) for n in sizes}
        gmac = contenders.count_gmac(one.network.removeprefix(PLAIN), arguments.image_size)
        model: dict[str, Any] = {"name": name, "gmac": gmac}
        model["parameters"] = sum(p.numel() for p in one.model.parameters())
        model |= {"kernels": {}, "moved_bytes": {}} if is_compiled(one.model) else count(one, kinds, batches[sizes[-1]])
        model["batches"] = []
        for n, batch in batches.items():
            gmac = none_if_unknown(training_giga_macs(one.model, arguments.image_size, n))
            of_batch: dict[str, Any] = {"batch_size": n, "training_gmac": gmac}
            for kind in kinds:
                show_progress(f"warming up {name}, {kind}, batch {n}")
                of_batch[kind] = {"memory_bytes": one.memory(kind, batch), "parts_milliseconds": []}
                runs[n, kind, name] = one.measurement(kind, batch, of_batch[kind]["parts_milliseconds"])
            model["batches"].append(of_batch)
        facts.append(model)
    runs = dict(sorted(runs.items(), key=lambda run: run[0][:2]))  # those of one size and kind one after the other
    precision = contenders.precision_of(arguments.precision, this_device())
    runs["matmul"], runs["copy"] = matrix_product(precision.device, precision.dtype), copying(precision.device)
    figures = common.in_turn(runs, arguments.repeats)
    for model in facts:
        for batch in model["batches"]:
            for kind in kinds:
                batch[kind]["images_per_second"] = figures.get((batch["batch_size"], kind, model["name"]))
    return common.start_report(arguments) | {
        "precision": precision.name,
        "kinds": kinds,
        "batch_sizes": sizes,
        "matmul_tflops": figures["matmul"],
        "copy_gb_per_second": figures["copy"],
        "models": facts,
    }


def count(one: Contender, kinds: tuple[str, ...], batch) -> dict[str, dict[str, int]]:
    """Count what it launches for one image, and what its kernels read and write for a batch, if that fits in memory."""
    single = one.task.synthetic_batch(2 if contenders.head_of(one.network) in HEADS else 1)
    counts: dict[str, dict[str, int]] = {"kernels": {}, "moved_bytes": {}}
    for kind in kinds:
        one.model.train(kind == "training")
        run = getattr(one, kind)
        counts["kernels"][kind] = count_kernels(partial(run, single), this_device())
        moved = within_memory(partial(moved_bytes, partial(run, batch)))
        if moved:
            counts["moved_bytes"][kind] = moved
    return counts


def tables(report: dict) -> list[Table]:
    """Images per second, the parts of a training step, and what lies behind them."""
    return [speeds(report), parts(report), work(report)]


def setting_of(report: dict) -> str:
    """Say how networks were measured."""
    settings, (height, width) = report["settings"], height_and_width(report["settings"]["image_size"])
    compiled = "" if settings["compile"] == "none" else f", torch.compile {settings['compile']}"
    return (
        f"{report['precision']}, {height} x {width}, channels last{compiled}, medians of {settings['repeats']} in turn"
    )


def compared_with(name: str) -> str:
    """Name the plain network in the same step: compiled or eager, for it does not know how to recompute."""
    network, _, how = name.partition(", ")
    if how == PLAIN_STEP:
        return network
    return PLAIN + network + (", compiled" if how == "compiled" else "")


def speeds(report: dict) -> Table:
    """A row for every network at every batch size."""
    by_name, rows = {model["name"]: model for model in report["models"]}, []
    for i, n in enumerate(report["batch_sizes"]):
        for model in report["models"]:
            row, batch, other = (
                [model["name"], f"{n:,}"],
                model["batches"][i],
                by_name.get(compared_with(model["name"])),
            )
            for kind in report["kinds"]:
                values = batch[kind]["images_per_second"]
                if values is None:
                    row += ["out of memory", "", ""]
                    continue
                against = other["batches"][i][kind]["images_per_second"] if other else None
                row += [rounded(statistics.median(values)), common.spread(values)]
                row.append(f"{ratio(values, against):.2f}" if against else "")
            taken = batch["training"]["memory_bytes"]
            rows.append([*row, rounded(taken / 1e9) if taken else ""])
    memory = "the most that training takes"
    if report["machine"]["device"] == "no GPU":
        memory = "activations kept for the backward pass, without weights, gradients and optimizer"
    title = f"Images per second: {setting_of(report)}. Training is the whole step. GB: {memory}."
    columns = [column for kind in report["kinds"] for column in (kind, "+-", "x plain")]
    return Table(title, ["", "batch", *columns, "GB"], rows)


def parts(report: dict) -> Table:
    """The parts of a step of the largest batch."""
    rows = []
    for model in report["models"]:
        measured = model["batches"][-1]["training"]["parts_milliseconds"]
        medians = [statistics.median(figures) for figures in zip(*measured, strict=True)]
        rows.append([model["name"], *map(rounded, medians)])
    return Table(
        f"Milliseconds of the parts of a training step, batch {report['batch_sizes'][-1]:,}.", ["", *PARTS], rows
    )


def work(report: dict) -> Table:
    """How many kernels, and how near to the limits of the device."""
    rate, bandwidth = statistics.median(report["matmul_tflops"]), statistics.median(report["copy_gb_per_second"])
    rows = []
    for model in report["models"]:
        batch, row = model["batches"][-1], [model["name"], f"{model['parameters'] / 1e6:.1f}"]
        row.append("" if model["gmac"] is None else f"{model['gmac']:.3g}")
        for kind in report["kinds"]:
            row.append(f"{model['kernels'][kind]:,}" if model["kernels"] else "")
            speed, moved = batch[kind]["images_per_second"], model["moved_bytes"].get(kind)
            if speed is None:
                row += ["", ""]
                continue
            milliseconds = 1e3 * batch["batch_size"] / statistics.median(speed)
            times, macs = (TRAIN_STEP_MACS, batch["training_gmac"]) if kind == "training" else (1, model["gmac"])
            share = None if macs is None else 200 * times * macs * batch["batch_size"] / rate / milliseconds
            row.append("" if share is None else f"{share:.0f} %")
            row.append(f"{100 * moved / 1e6 / bandwidth / milliseconds:.0f} %" if moved else "")
        rows.append(row)
    title = (
        f"Kernels for one image; and of the time of batch {report['batch_sizes'][-1]:,} the share that its matrix "
        f"products would take at the {rate:.3g} TFLOP/s of a large one in the same run, and all that its eager kernels "
        f"read and write at the {rounded(bandwidth)} GB/s of a copy (caches left out)."
    )
    columns = [column for kind in report["kinds"] for column in (kind, "products", "bytes")]
    return Table(title, ["", "M params", "GMAC", *columns], rows)
