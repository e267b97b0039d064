"""Check a data set before training on it: ``python scripts/check_dataset.py --data-path DIR``.

Decodes every image as the trainer does, names the bad and odd ones, duplicates and leaks from train to val, and draws
what the augmentation makes of some. Exit status 0: sound; 1: an image cannot be decoded, or leaks; 2: see the error.
"""

import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import CLASSES, OBJECTS, PIXELS, Config, build_config
from data.decoding import build_decoding
from data.files import describe_left_out
from data.inspection import inspect, make_report, open_splits
from data.inspection_report import print_report
from data.preview import Preview
from tasks import object_check
from tasks.pixel_check import ImagesAlone, count_pixels, describe_pixels, open_pair_splits, pixel_table
from tasks.pixel_check import preview as draw_pairs
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.files import write_whole, writing
from utils.surroundings import a_path
from utils.tables import show

REMEDY = "choose another --output"


def parse(arguments: list[str]) -> Namespace:
    parser = Parser(prog="scripts/check_dataset.py", description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.add_argument("--data-path", metavar="DIR", help="folder of the data set, in any layout (docs/data.md)")
    parser.add_argument("--cfg", metavar="FILE", default="", help="settings of the run that is to use it")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="+", action="extend", default=[], help="more settings")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", metavar="N", type=int, default=cores, help="processes; as many as cores")
    parser.add_argument(
        "--output", metavar="FOLDER", type=a_path, default=Path("output/check_dataset"), help="for results: %(default)s"
    )
    given = parser.parse_args(arguments)
    if given.workers < 1:
        raise UserError(f"--workers {given.workers}: must be at least 1")
    return given


def check(arguments: list[str]) -> int:
    given = parse(arguments)
    flags = [("DATA.DATA_PATH", given.data_path, "--data-path")] if given.data_path is not None else []
    config = build_config(given.cfg, given.opts, flags)
    return {CLASSES: check_images, PIXELS: check_pairs, OBJECTS: check_objects}[config.TASK](config, given)


def check_images(config: Config, given: Namespace) -> int:
    """Check images of classes; returns the exit status."""
    indexes, classes = open_splits(config)
    preview = Preview(config, len(classes))
    make_folder(given.output)
    splits = {name: inspect(index, build_decoding(config), given.workers, name) for name, index in indexes.items()}
    first = next(iter(splits.values()))
    report = make_report(config, splits, classes)
    return finish(given, report, describe_left_out(indexes), preview.draw(first.index, first.decoded(), classes))


def check_pairs(config: Config, given: Namespace) -> int:
    """Check images with label maps; returns the exit status."""
    indexes, classes = open_pair_splits(config)
    make_folder(given.output)
    images = {name: ImagesAlone(index) for name, index in indexes.items()}
    splits = {name: inspect(index, build_decoding(config), given.workers, name) for name, index in images.items()}
    report = make_report(config, splits, ["image"])
    for name, index in indexes.items():
        counts = count_pixels(config, index, classes, given.workers, name)
        report["splits"][name] |= describe_pixels(counts, classes)
    show(pixel_table(report, classes))
    return finish(given, report, describe_left_out(indexes), draw_pairs(config, next(iter(indexes.values())), classes))


def check_objects(config: Config, given: Namespace) -> int:
    """Check images with objects; returns the exit status."""
    indexes, classes = object_check.open_object_splits(config)
    make_folder(given.output)
    splits = {}
    for name, index in indexes.items():
        splits[name] = inspect(ImagesAlone(index), build_decoding(config), given.workers, name)
        object_check.mark_other_sizes(splits[name], index.sizes)
    report = make_report(config, splits, ["image"]) | {"classes": len(classes)}
    for name, index in indexes.items():
        report["splits"][name] |= object_check.describe_objects(config, index, classes)
    show(object_check.object_table(report, classes))
    first, index = next(iter(indexes.items()))
    drawn = object_check.preview(config, splits[first], index, classes)
    return finish(given, report, describe_left_out(indexes), drawn)


def make_folder(folder: Path) -> None:
    """See that results can be written: after an hour of checking it would be late to find out."""
    with writing(folder, REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()


def finish(given: Namespace, report: dict, left_out: str, drawn: bytes | None) -> int:
    """Write and print all that was found; returns the exit status."""
    file, sheet = given.output / "report.json", given.output / "augmentations.png"
    with writing(given.output, REMEDY):
        write_whole(file, json.dumps(report, indent=1).encode())
        if drawn:
            write_whole(sheet, drawn)
    print_report(report, left_out, file, sheet if drawn else None)
    return 0 if report["sound"] else 1


main = partial(run_command, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
