"""How fast the configured model runs on this device, on synthetic images."""

import json
import math
import statistics
from collections.abc import Callable

import torch

from config import Config, output_dir
from engine.model import (
    check_smallest_batch,
    compile_in_place,
    describe_gmac,
    giga_macs,
    prepare_model,
    training_giga_macs,
)
from engine.precision import choose_precision
from engine.step import TrainStep
from models import left_out
from optimizer import build_optimizer
from tasks import build_task
from utils.bar import bar
from utils.distributed import world_size
from utils.errors import UserError
from utils.image_size import height_and_width
from utils.logger import RunLog
from utils.meters import peak_memory_bytes
from utils.tables import Table, show
from utils.timing import seconds

WARM_UP_RUNS = 3
REPEATS = 10
SECONDS_PER_REPEAT = 0.5
TRAIN_STEP_MACS = 3  # a backward pass computes two products for each one of the forward pass


def run_throughput(config: Config, device: torch.device) -> dict:
    """``--throughput``: time the forward pass and the training step; prints a table, appends to throughput.json."""
    if world_size() > 1:
        raise UserError("--throughput times one device: start it without torchrun")
    if config.MODEL.RESUME or config.MODEL.PRETRAINED:
        raise UserError("--throughput times random weights: leave out --resume and --pretrained")
    precision = choose_precision(config, device)
    task = build_task(config, device)
    model = prepare_model(config, task.model, device)
    gmac = giga_macs(model, config.DATA.IMG_SIZE, device)
    check_smallest_batch(config, model, config.DATA.BATCH_SIZE)
    training_gmac = training_giga_macs(model, config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE)
    step = TrainStep(
        task,
        model,
        build_optimizer(config, model),
        precision.scaler(),
        precision,
        seed=config.SEED,
        max_norm=config.TRAIN.CLIP_GRAD or float("inf"),
    )
    compile_in_place(config, model)

    batch_size, size = config.DATA.BATCH_SIZE, height_and_width(config.DATA.IMG_SIZE)
    batch = task.synthetic_batch(batch_size)
    images = task.prepare(batch).images

    @torch.inference_mode()
    def forward() -> None:
        with precision.autocast():
            model(images)

    def training_step() -> None:
        step(0, iter([batch]))

    log = RunLog(output_dir(config), config, "throughput")
    runs = WARM_UP_RUNS + 1 + REPEATS
    for line in left_out(config):
        log.message(line)
    shown = f"{size[0]} x {size[1]}"
    log.message(f"timing {config.MODEL.NAME} on batches of {batch_size} at {shown}, at least {runs} runs each")
    result = {
        "model": config.MODEL.NAME,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmac": none_if_unknown(gmac),
        "training_gmac": none_if_unknown(training_gmac),
        "image_size": config.DATA.IMG_SIZE,
        "batch_size": batch_size,
        "precision": precision.name,
        "compile": config.TRAIN.COMPILE,
        "use_checkpoint": config.TRAIN.USE_CHECKPOINT,
        "device": describe_device(device),
        "torch": torch.__version__,
    }
    loops = (("forward", forward, False, gmac), ("training_step", training_step, True, TRAIN_STEP_MACS * training_gmac))
    for name, run, training, work in loops:
        model.train(training)
        bar.doing(f"timing the {name.replace('_', ' ')}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        milliseconds = time_repeatedly(run)
        median = statistics.median(milliseconds)
        result[name] = {
            "images_per_second": 1e3 * batch_size / median,
            "milliseconds": {"median": median, "min": min(milliseconds), "max": max(milliseconds)},
            "tflops": none_if_unknown(2 * work * batch_size / median),  # GMAC / ms is TMAC / s
            "peak_memory_bytes": peak_memory_bytes(device),
        }
    bar.stop()
    print_table(result)
    log.append("throughput.json", json.dumps(result))
    with log:
        log.message(f"results in {log.folder / 'throughput.json'}")
    return result


def none_if_unknown(number: float) -> float | None:
    """As JSON has it, which knows no NaN."""
    return None if math.isnan(number) else number


def describe_device(device: torch.device) -> str:
    """The GPU's name, or how many threads of the CPU are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def time_repeatedly(run: Callable[[], None]) -> list[float]:
    """Milliseconds of one run: REPEATS figures, each the mean over about SECONDS_PER_REPEAT, after a warm-up."""
    for _ in range(WARM_UP_RUNS):
        run()
    runs = max(1, round(SECONDS_PER_REPEAT / seconds(run)))
    return [1e3 * seconds(run, runs) for _ in range(REPEATS)]


def print_table(result: dict) -> None:
    """The result for a person."""
    title = (
        f"{result['model']}  {result['parameters'] / 1e6:.1f} M parameters  "
        f"{describe_gmac(math.nan if result['gmac'] is None else result['gmac'], result['image_size'])}\n"
        f"{result['precision']}  batch {result['batch_size']}  compile {result['compile']}  {result['device']}"
    )
    rows = []
    for name in ("forward", "training_step"):
        row, ms = result[name], result[name]["milliseconds"]
        rows.append(
            [
                name.replace("_", " "),
                f"{row['images_per_second']:,.1f}",
                f"{ms['median']:,.1f}",
                f"{ms['min']:,.1f} - {ms['max']:,.1f}",
                "unknown" if row["tflops"] is None else f"{row['tflops']:.3g}",
                f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            ]
        )
    show(Table(title, ["", "images/s", "median ms", "min - max ms", "TFLOP/s", "peak memory"], rows))
