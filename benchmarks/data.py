"""The input pipeline: images per second of this loader and of others, and the time of every stage of this one."""

import itertools
import statistics
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_dataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import common
from benchmarks.common import ratio, rounded
from config import CLASSES, build_config
from data.augmentation import Plan, augments_on_device, build_train_stage, build_train_transform
from data.build import build_train_loader
from data.dataset import DecodeAndTransform
from data.decoding import build_decoding, decode
from data.index import Index
from data.splits import open_images
from utils.errors import UserError
from utils.image_size import height_and_width
from utils.machine import this_device
from utils.tables import Table
from utils.timing import seconds

WARM_UP_BATCHES = 6
STAGE_IMAGES = 400
ENDLESS = 10**6
TIMM, TORCHVISION = "timm create_loader", "torchvision, published transform"


def benchmark_data(arguments: Namespace) -> None:
    """Measure images per second of every loader, and milliseconds of every stage of this one."""
    warnings.filterwarnings("ignore", message=".*worker processes in total.*|.*encoding capabilities of TorchVision.*")
    torch.set_num_threads(1)  # the workers need the cores
    config = config_for(arguments, arguments.data_path)
    if config.TASK != CLASSES:
        from benchmarks.dense import benchmark_dense  # which takes much from here

        benchmark_dense(arguments, config)
        return
    if not (Path(arguments.data_path) / "train").is_dir():
        raise UserError(f"--data-path {arguments.data_path} has no folder train/, which timm and torchvision read")
    loaders = contenders(arguments, config, this_device())
    runs = {
        name: lambda start=start: images_per_second(start, arguments.workers, arguments.batches)
        for name, start in loaders.items()
    }
    report = common.start_report(arguments) | {
        "images_per_second": common.in_turn(runs, arguments.repeats),
        "milliseconds_per_image": stage_milliseconds(config, this_device()),
    }
    common.finish_report(report, tables(report), arguments.output)


def contenders(arguments: Namespace, config, device: torch.device) -> dict[str, Callable[[], Iterator[int]]]:
    """Make functions that start a loader, which yields the number of images of each batch.

    Without a GPU the share of a GPU is left out, for this loader and for timm's alike.
    """
    cpu = torch.device("cpu")
    starts = {
        "this loader, device augmentation": lambda: of_this_loader(config, True, device),
        "this loader, all on the CPU": lambda: of_this_loader(config, False, cpu, whole=True),
        TIMM: lambda: of_timm(config, device, whole=device.type == "cuda"),
        f"{TIMM}, all on the CPU": lambda: of_timm(config, cpu, whole=True),
        TORCHVISION: lambda: of_torchvision(config),
    }
    if arguments.prepared:
        prepared = config_for(arguments, arguments.prepared)
        starts["this loader, device, --prepared"] = lambda: of_this_loader(prepared, True, device)
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        starts["NVIDIA DALI, decode, crop, flip"] = lambda: of_dali(config)
    return starts


def config_for(arguments: Namespace, path: str):
    """The settings of the loaders, for the images below ``path``."""
    opts = ["DATA.NUM_WORKERS", str(arguments.workers), "DATA.BATCH_SIZE", str(arguments.batch_size)]
    return build_config(arguments.cfg, opts, [("DATA.DATA_PATH", str(path), "--data-path")])


def of_this_loader(config, on_device: bool, device: torch.device, whole: bool = False) -> Iterator[int]:
    """Start this project's loader; ``whole`` asks for the finished batch where the device is a CPU."""
    images = cast(Index, open_images(config, training=True)[0])
    transform = build_train_transform(config, on_device and augments_on_device(config, torch.device("cuda", 0)))
    stage: Any = build_train_stage(config, device) if whole or device.type == "cuda" else NoStage()
    sample = DecodeAndTransform(transform, build_decoding(config))
    loader = build_train_loader(config, images, sample, transform.size, stage)
    loader.batches.last_step, loader.on_bad_image = ENDLESS, print
    return (len(batch.images) for batch in loader)


class NoStage:
    """Leaves images as the loader processes send them, which is as good as any other way to count them."""

    device = torch.device("cpu")

    def __call__(self, images: Tensor, plans: list[Plan]) -> Tensor:
        return images


def of_timm(config, device: torch.device, whole: bool) -> Iterator[int]:
    """Start timm's; ``whole`` asks it to normalise and erase too."""
    dataset = create_dataset("", root=str(Path(config.DATA.DATA_PATH) / "train"))
    dataset.reader.samples = lengthened(dataset.reader.samples)
    loader = create_loader(
        dataset, config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE, is_training=True, num_workers=config.DATA.NUM_WORKERS,
        device=device, pin_memory=device.type == "cuda", **recipe(config),
    )  # fmt: skip
    return (len(targets) for _, targets in (loader if whole else loader.loader))


def of_torchvision(config) -> Iterator[int]:
    """Start torch's, with the transform of the published recipe."""
    transform = create_transform(config.DATA.IMG_SIZE, is_training=True, **recipe(config))
    dataset = ImageFolder(str(Path(config.DATA.DATA_PATH) / "train"), transform)
    dataset.samples = lengthened(dataset.samples)
    loader = DataLoader(dataset, config.DATA.BATCH_SIZE, shuffle=True, num_workers=config.DATA.NUM_WORKERS)
    return (len(targets) for _, targets in loader)


def lengthened(samples: list) -> list:
    """Repeat them to some hundred thousand images: the end of a short epoch would stop loaders that begin each anew."""
    return samples * max(1, 200_000 // len(samples))


def recipe(config) -> dict:
    """Say the augmentation in timm's words."""
    aug = config.AUG
    return dict(
        scale=tuple(aug.SCALE), ratio=tuple(aug.RATIO), hflip=aug.HFLIP, color_jitter=aug.COLOR_JITTER or None,
        auto_augment=None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
        interpolation=config.DATA.INTERPOLATION, mean=tuple(config.DATA.MEAN), std=tuple(config.DATA.STD),
        re_prob=aug.REPROB, re_mode=aug.REMODE, re_count=aug.RECOUNT,
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


def images_per_second(start: Callable[[], Iterator[int]], workers: int, batches: int) -> float:
    """Time ``batches`` batches after a warm-up; more of them where many workers deliver their first ones at once."""
    counts = start()
    for _ in itertools.islice(counts, max(WARM_UP_BATCHES, 3 * workers)):
        pass
    taken: list[int] = []
    elapsed = seconds(lambda: taken.extend(itertools.islice(counts, max(batches, 8 * workers))))
    return sum(taken) / elapsed


def stage_milliseconds(config, device: torch.device) -> dict[str, float]:
    """Time one image on one core (the last two: a batch on the device), in the order of the work."""
    images = cast(Index, open_images(config, training=True)[0])
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
    images_of = {name: len(batch) if "(" in name else len(chosen) for name in stages}
    return {name: 1e3 * median_seconds(run) / images_of[name] for name, run in stages.items()}


def median_seconds(run: Callable[[], object]) -> float:
    """Time three runs after one that does not count."""
    run()
    return statistics.median(seconds(run) for _ in range(3))


def tables(report: dict) -> list[Table]:
    """Every loader beside timm's and torchvision's; every stage of this one."""
    settings, figures = report["settings"], report["images_per_second"]
    title = f"Loaders: {settings['workers']} workers, batches of {settings['batch_size']}."
    if report["machine"]["device"] == "no GPU":
        title += " The share of a GPU is left out of device augmentation, and of timm's create_loader alike."
    rows = [
        [
            name,
            rounded(statistics.median(values)),
            common.spread(values),
            *(f"{ratio(values, figures[other]):.2f}" for other in (TIMM, TORCHVISION)),
        ]
        for name, values in figures.items()
    ]
    stages = [[name, f"{value:.3f}"] for name, value in report["milliseconds_per_image"].items()]
    return [
        Table(title, ["loader", "images/s", "+-", "x timm", "x torchvision"], rows),
        Table("This loader on one core.", ["stage", "ms an image"], stages),
    ]
