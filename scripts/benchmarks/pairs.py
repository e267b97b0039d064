"""The input pipeline of segmentation: images per second, and the time of every stage."""

import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from data.augmentation.pairs import PairTransform, build_pair_transform, distort
from data.build import build_train_loader, open_pairs
from data.decoding import build_decoding, decode
from data.pairs import LabelMaps, decode_labels
from scripts.benchmarks import common
from scripts.benchmarks.common import rounded
from scripts.benchmarks.data import ENDLESS, STAGE_IMAGES, NoStage, images_per_second, median_seconds
from tasks.segmentation import DecodePair, label_table
from utils.tables import Table


def benchmark_pairs(arguments: Namespace, config) -> None:
    """Measure images per second of the loader, and milliseconds of every stage on one core."""
    index = open_pairs(config, training=True)[0]
    assert index is not None
    transform = build_pair_transform(config)
    sample = DecodePair(label_table(config, index, len(index.classes)), build_decoding(config), transform)

    def start():
        loader = build_train_loader(config, index, sample, transform.size, cast(Any, NoStage()))
        loader.batches.last_step, loader.on_bad_image = ENDLESS, print
        return (len(batch.images) for batch in loader)

    runs = {"this loader": lambda: images_per_second(start, arguments.workers, arguments.batches)}
    report = common.start_report(arguments) | {
        "images_per_second": common.in_turn(runs, arguments.repeats),
        "milliseconds_per_image": stage_milliseconds(index, sample, transform),
    }
    common.finish_report(report, tables(report, config), arguments.output)


def stage_milliseconds(index: LabelMaps, sample: DecodePair, transform: PairTransform) -> dict[str, float]:
    """Time one pair on one core, in the order of the work."""
    chosen = range(min(len(index), STAGE_IMAGES // 4))
    raw = [index[i] for i in chosen]
    images = [decode(image, sample.decoding) for image, _ in raw]
    labels = [torch.from_numpy(sample.table[decode_labels(data)]) for _, data in raw]
    plain = replace(transform, distort=0.0)
    cropped = [plain(image, each)[0] for image, each in zip(images, labels, strict=True)]
    stages: dict[str, Callable[[], object]] = {
        "read": lambda: [index[i] for i in chosen],
        "decode image": lambda: [decode(image, sample.decoding) for image, _ in raw],
        "decode label map": lambda: [np.take(sample.table, decode_labels(data)) for _, data in raw],
        "resize, crop, flip, pad": lambda: [plain(image, each) for image, each in zip(images, labels, strict=True)],
        "change colours": lambda: [distort(image, transform.distort) for image in cropped],
    }
    return {name: 1e3 * median_seconds(run) / len(chosen) for name, run in stages.items()}


def tables(report: dict, config) -> list[Table]:
    """The loader, and its stages."""
    settings, values = report["settings"], report["images_per_second"]["this loader"]
    title = f"Loader of pairs: crops of {config.DATA.IMG_SIZE}, {settings['workers']} workers."
    rows = [["this loader", rounded(statistics.median(values)), common.spread(values)]]
    stages = [[name, f"{value:.3f}"] for name, value in report["milliseconds_per_image"].items()]
    return [
        Table(title, ["loader", "images/s", "+-"], rows),
        Table("This loader on one core.", ["stage", "ms an image"], stages),
    ]
