"""Measure how fast parts of the trainer are, beside others that do the same, on this machine.

    python scripts/benchmark.py data --data-path /imagenet --workers 8
    python scripts/benchmark.py checkpoint --output /the/disk/of/the/run

Everything that is compared runs in turn, several times, in one run: a ratio says more than a number, since machines
are shared. A run's table goes to the terminal and its figures to OUTPUT/benchmark_WHAT.json.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
import torchvision
from rich import box
from rich.console import Console
from rich.table import Table
from timm.data import create_dataset, create_loader, create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from config import build_config
from data.build import augments_on_device, build_train_stage, open_images
from data.dataset import ImageDataset
from data.decoding import decode
from data.loading import TrainLoader
from data.policy import Plan
from data.sampling import TrainBatches
from data.transforms import build_train_transform
from engine.checkpoints import Checkpoints
from utils.checkpoint import save_atomically
from utils.errors import Parser, UserError

WARM_UP_BATCHES = 6
STAGE_IMAGES = 400
ENDLESS = 10**6
Contender = Callable[[], Iterator[int]]
"""Starts a loader and yields the number of images of each batch."""


def main() -> int:
    try:
        arguments = parse(sys.argv[1:])
        {"data": benchmark_data, "checkpoint": benchmark_checkpoint}[arguments.what](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="scripts/benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    data = what.add_parser("data", help="the input pipeline: this loader, timm's, torchvision's and DALI's")
    data.add_argument("--data-path", required=True, metavar="DIR", help="original images, as train/CLASS/*.jpg")
    data.add_argument("--prepared", metavar="DIR", help="the same images as prepare_imagenet.py has written them")
    data.add_argument("--cfg", default="", metavar="FILE", help="recipe and image size; the published one by default")
    data.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="loader processes")
    data.add_argument("--batch-size", type=int, default=64, metavar="N")
    data.add_argument("--batches", type=int, default=40, metavar="N", help="batches of one measurement")
    data.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each loader")
    data.add_argument("--output", type=Path, default=Path("output"), metavar="DIR")
    saving = what.add_parser("checkpoint", help="how long saving a checkpoint keeps training waiting")
    saving.add_argument("--megabytes", type=int, default=300, metavar="N", help="size of the checkpoint")
    saving.add_argument("--repeats", type=int, default=5, metavar="N")
    saving.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="where files are written")
    parsed = parser.parse_args(arguments)
    for name in ("workers", "batch_size", "batches", "repeats", "megabytes"):
        if getattr(parsed, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return parsed


# ---- the input pipeline


def benchmark_data(arguments: argparse.Namespace) -> None:
    """Images per second of every loader, and milliseconds of every stage of this one."""
    warnings.filterwarnings("ignore", message=".*worker processes in total.*|.*encoding capabilities of TorchVision.*")
    torch.set_num_threads(1)  # the workers need the cores
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not (Path(arguments.data_path) / "train").is_dir():
        raise UserError(f"--data-path {arguments.data_path} has no folder train/, which timm and torchvision read")
    contenders = data_contenders(arguments, device)
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = [(repeat, name) for repeat in range(arguments.repeats) for name in contenders]
    for number, (_, name) in enumerate(rounds, 1):
        show_progress(f"{number}/{len(rounds)}  {name}")
        figures[name].append(images_per_second(contenders[name], arguments.workers, arguments.batches))
    show_progress("")
    stages = stage_milliseconds(config_for(arguments, arguments.data_path), device)
    report = {
        "what": "data", "date": date.today().isoformat(), "machine": machine(device),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "images_per_second": figures, "milliseconds_per_image": stages,
    }  # fmt: skip
    print_data_report(report, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "benchmark_data.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"figures in {path}")


def show_progress(text: str) -> None:
    """On a terminal, in place of the text before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def data_contenders(arguments: argparse.Namespace, device: torch.device) -> dict[str, Contender]:
    """Who takes part. Without a GPU the share of a GPU is left out, for this loader and for timm's alike."""
    config = config_for(arguments, arguments.data_path)
    cpu = torch.device("cpu")
    contenders = {
        "this loader, device augmentation": lambda: of_this_loader(config, True, device),
        "this loader, all on the CPU": lambda: of_this_loader(config, False, cpu, whole=True),
        "timm create_loader": lambda: of_timm(config, device, whole=device.type == "cuda"),
        "timm create_loader, all on the CPU": lambda: of_timm(config, cpu, whole=True),
        "torchvision, published transform": lambda: of_torchvision(config),
    }
    if arguments.prepared:
        prepared = config_for(arguments, arguments.prepared)
        contenders["this loader, device, --prepared"] = lambda: of_this_loader(prepared, True, device)
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        pass
    else:
        contenders["NVIDIA DALI, decode, crop, flip"] = lambda: of_dali(config)
    return contenders


def config_for(arguments: argparse.Namespace, path: str):
    opts = ["DATA.NUM_WORKERS", str(arguments.workers), "DATA.BATCH_SIZE", str(arguments.batch_size)]
    return build_config(arguments.cfg, opts, [("DATA.DATA_PATH", str(path), "--data-path")])


def of_this_loader(config, on_device: bool, device: torch.device, whole: bool = False) -> Iterator[int]:
    """``whole`` asks for the finished batch where the device is a CPU."""
    images = open_images(config, training=True)[0]
    batches = TrainBatches(len(images), min(config.DATA.BATCH_SIZE, len(images)), 1, 0, 1, config.SEED)
    on_device = on_device and augments_on_device(config, torch.device("cuda", 0))
    dataset = ImageDataset(images, build_train_transform(config, on_device), config.SEED, replace_bad=True)
    loader = TrainLoader(dataset, batches, config.DATA.NUM_WORKERS, build_train_stage(config, device), print)
    batches.last_step = ENDLESS
    if whole or device.type == "cuda":
        return (len(targets) for _, targets in loader)
    return (len(batch.targets) for batch in loader.host_batches())


def of_timm(config, device: torch.device, whole: bool) -> Iterator[int]:
    dataset = create_dataset("", root=str(Path(config.DATA.DATA_PATH) / "train"))
    dataset.reader.samples = lengthened(dataset.reader.samples)
    loader = create_loader(
        dataset, config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE, is_training=True, num_workers=config.DATA.NUM_WORKERS,
        device=device, pin_memory=device.type == "cuda", re_prob=config.AUG.REPROB, re_mode=config.AUG.REMODE,
        re_count=config.AUG.RECOUNT, **recipe(config),
    )  # fmt: skip
    return (len(targets) for _, targets in (loader if whole else loader.loader))


def of_torchvision(config) -> Iterator[int]:
    transform = create_transform(
        config.DATA.IMG_SIZE, is_training=True, re_prob=config.AUG.REPROB, re_mode=config.AUG.REMODE,
        re_count=config.AUG.RECOUNT, **recipe(config),
    )  # fmt: skip
    dataset = ImageFolder(str(Path(config.DATA.DATA_PATH) / "train"), transform)
    dataset.samples = lengthened(dataset.samples)
    loader = DataLoader(dataset, config.DATA.BATCH_SIZE, shuffle=True, num_workers=config.DATA.NUM_WORKERS)
    return (len(targets) for _, targets in loader)


def lengthened(samples: list) -> list:
    """Repeated to some hundred thousand images: the end of a short epoch would stop loaders that begin each anew."""
    return samples * max(1, 200_000 // len(samples))


def recipe(config) -> dict:
    """The augmentation in timm's words."""
    aug = config.AUG
    return dict(
        scale=tuple(aug.SCALE), ratio=tuple(aug.RATIO), hflip=aug.HFLIP, color_jitter=aug.COLOR_JITTER or None,
        auto_augment=None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
        interpolation=config.DATA.INTERPOLATION, mean=tuple(config.DATA.MEAN), std=tuple(config.DATA.STD),
    )  # fmt: skip


def of_dali(config) -> Iterator[int]:
    """Decode the crop's region only, resize and flip; without the policy, for which DALI has other operations."""
    from nvidia.dali import fn, pipeline_def, types

    size, batch_size = config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE

    @pipeline_def(batch_size=batch_size, num_threads=config.DATA.NUM_WORKERS, device_id=None)
    def pipeline():
        data, labels = fn.readers.file(file_root=str(Path(config.DATA.DATA_PATH) / "train"), random_shuffle=True)
        aspect, area = tuple(config.AUG.RATIO), tuple(config.AUG.SCALE)
        images = fn.decoders.image_random_crop(data, random_aspect_ratio=aspect, random_area=area)
        images = fn.resize(images, size=[size, size], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip(probability=config.AUG.HFLIP)), labels

    running = pipeline()
    running.build()
    while True:
        yield len(running.run()[1])


def images_per_second(start: Contender, workers: int, batches: int) -> float:
    """Of ``batches`` batches after a warm-up; more of them where many workers deliver their first ones at once."""
    counts = start()
    for _ in itertools.islice(counts, max(WARM_UP_BATCHES, 3 * workers)):
        pass
    began = time.perf_counter()
    images = sum(itertools.islice(counts, max(batches, 8 * workers)))
    synchronize()
    return images / (time.perf_counter() - began)


def stage_milliseconds(config, device: torch.device) -> dict[str, float]:
    """Of one image on one core (the last one: of a batch on the device), in the order of the work."""
    images = open_images(config, training=True)[0]
    here, there = build_train_transform(config, False), build_train_transform(config, True)
    stage = build_train_stage(config, device)
    chosen = range(min(len(images), STAGE_IMAGES))
    data = [images[i][0] for i in chosen]
    decoded = [decode(item) for item in data]
    cropped = [here.crop_and_flip(image) for image in decoded]
    batch = torch.stack([image.permute(1, 2, 0) for image in cropped[: config.DATA.BATCH_SIZE]]).permute(0, 3, 1, 2)
    erasing = [Plan((), there.draw_plan().patches) for _ in range(len(batch))]
    whole = [there.draw_plan() for _ in range(len(batch))]
    stages: dict[str, Callable[[], object]] = {
        "read": lambda: [images[i] for i in chosen],
        "decode": lambda: [decode(item) for item in data],
        "crop and flip": lambda: [here.crop_and_flip(image) for image in decoded],
        "augment with Pillow": lambda: [here.run_policy(image) for image in cropped],
        "draw what to augment": lambda: [there.draw_plan() for _ in chosen],
        f"normalise and erase ({device.type})": lambda: stage(batch, erasing),
        f"the same and augment ({device.type})": lambda: stage(batch, whole),
    }
    return {name: milliseconds(run) / (len(batch) if "(" in name else len(chosen)) for name, run in stages.items()}


def milliseconds(run: Callable[[], object]) -> float:
    """The median of three runs after one that does not count."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_data_report(report: dict, arguments: argparse.Namespace) -> None:
    console = Console()
    title = f"{arguments.workers} workers, batches of {arguments.batch_size}"
    if report["machine"]["device"] == "no GPU":
        title += "; no GPU: its share is left out of device augmentation, and of timm's create_loader alike"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("loader", "images/s", "min - max", "x timm", "x torchvision"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    figures = report["images_per_second"]
    timms = next(statistics.median(values) for name, values in figures.items() if name.startswith("timm"))
    published = next(statistics.median(values) for name, values in figures.items() if name.startswith("torchvision"))
    for name, values in figures.items():
        median = statistics.median(values)
        spread = f"{min(values):,.0f} - {max(values):,.0f}"
        table.add_row(name, f"{median:,.0f}", spread, f"{median / timms:.2f}", f"{median / published:.2f}")
    console.print(table)
    table = Table(title="this loader, one core", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    table.add_column("ms an image", justify="right")
    for name, value in report["milliseconds_per_image"].items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))


# ---- saving


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


def seconds(run: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


# ---- what all of them use


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


if __name__ == "__main__":
    sys.exit(main())
