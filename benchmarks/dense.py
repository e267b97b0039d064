"""The input pipeline of segmentation and detection: images per second, and the time of every stage."""

import statistics
from argparse import Namespace
from typing import Any, cast

from benchmarks import common
from benchmarks.common import rounded
from benchmarks.data import ENDLESS, NoStage, images_per_second, median_seconds
from config import PIXELS
from data.build import build_train_loader
from tasks.stages import object_input, pair_input
from utils.tables import Table


def benchmark_dense(arguments: Namespace, config) -> None:
    """Measure images per second of the loader, and milliseconds of every stage on one core."""
    data = (pair_input if config.TASK == PIXELS else object_input)(config)

    def start():
        loader = build_train_loader(config, data.index, data.sample, data.size, cast(Any, NoStage()), data.groups)
        loader.batches.last_step, loader.on_bad_image = ENDLESS, print
        return (len(batch.images) for batch in loader)

    runs = {"this loader": lambda: images_per_second(start, arguments.workers, arguments.batches)}
    report = common.start_report(arguments) | {
        "images_per_second": common.in_turn(runs, arguments.repeats),
        "milliseconds_per_image": {name: 1e3 * median_seconds(run) / data.images for name, run in data.stages.items()},
    }
    common.finish_report(report, tables(report, config), arguments.output)


def tables(report: dict, config) -> list[Table]:
    """The loader, and its stages."""
    settings, values = report["settings"], report["images_per_second"]["this loader"]
    seen = f"crops of {config.DATA.IMG_SIZE}" if config.TASK == PIXELS else f"images within {config.AUG.RESIZE}"
    title = f"Loader for {config.TASK}: {seen}, {settings['workers']} workers."
    rows = [["this loader", rounded(statistics.median(values)), common.spread(values)]]
    stages = [[name, f"{value:.3f}"] for name, value in report["milliseconds_per_image"].items()]
    return [
        Table(title, ["loader", "images/s", "+-"], rows),
        Table("This loader on one core.", ["stage", "ms an image"], stages),
    ]
