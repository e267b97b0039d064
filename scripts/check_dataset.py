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

from config import CLASSES, OBJECTS, PIXELS, build_config
from data.inspection import Checked
from data.inspection_report import print_report
from data.preview import check_images
from tasks.object_check import check_objects
from tasks.pixel_check import check_pairs
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
    make_folder(given.output)
    checked = {CLASSES: check_images, PIXELS: check_pairs, OBJECTS: check_objects}[config.TASK](config, given.workers)
    return finish(given, checked)


def make_folder(folder: Path) -> None:
    """See that results can be written: after an hour of checking it would be late to find out."""
    with writing(folder, REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()


def finish(given: Namespace, checked: Checked) -> int:
    """Write and print all that was found; returns the exit status."""
    file, sheet = given.output / "report.json", given.output / "augmentations.png"
    with writing(given.output, REMEDY):
        write_whole(file, json.dumps(checked.report, indent=1).encode())
        if checked.sheet:
            write_whole(sheet, checked.sheet)
    show(*checked.tables)
    print_report(checked.report, checked.left_out, file, sheet if checked.sheet else None)
    return 0 if checked.report["sound"] else 1


main = partial(run_command, check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
