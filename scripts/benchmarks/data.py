"""The input pipeline: images per second of this loader and of others, and the time of every stage of this one."""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from timm.data import create_dataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from config import build_config
from data.augmentation import Plan, augments_on_device, build_train_stage, build_train_transform
from data.build import open_images
from data.dataset import DecodeAndTransform, ImageDataset
from data.decoding import build_decoding, decode
from data.loading import TrainLoader
from data.sampling import TrainBatches
from scripts.benchmarks.common import machine, show_progress, synchronize
from utils.errors import UserError
from utils.image_size import height_and_width

WARM_UP_BATCHES = 6
STAGE_IMAGES = 400
ENDLESS = 10**6
Contender = Callable[[], Iterator[int]]
"""Starts a loader and yields the number of images of each batch."""


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
    transform = build_train_transform(config, on_device)
    stage = build_train_stage(config, device) if whole or device.type == "cuda" else NoStage()
    dataset = ImageDataset(images, DecodeAndTransform(transform, build_decoding(config)), config.SEED, True)
    loader = TrainLoader(dataset, batches, config.DATA.NUM_WORKERS, transform.size, stage, print)
    batches.last_step = ENDLESS
    return (len(batch.images) for batch in loader)


class NoStage:
    """Leaves images as the loader processes send them, which is as good as any other way to count them."""

    device = torch.device("cpu")

    def __call__(self, images: Tensor, plans: list[Plan]) -> Tensor:
        return images


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

    size, batch_size = list(height_and_width(config.DATA.IMG_SIZE)), config.DATA.BATCH_SIZE

    @pipeline_def(batch_size=batch_size, num_threads=config.DATA.NUM_WORKERS, device_id=None)
    def pipeline():
        data, labels = fn.readers.file(file_root=str(Path(config.DATA.DATA_PATH) / "train"), random_shuffle=True)
        aspect, area = tuple(config.AUG.RATIO), tuple(config.AUG.SCALE)
        images = fn.decoders.image_random_crop(data, random_aspect_ratio=aspect, random_area=area)
        images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
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
