"""Make COCO's json of boxes in Pascal VOC's xml or YOLO's text files: ``python scripts/voc_to_coco.py FOLDER``.

Writes annotations/train.json and annotations/val.json into the folder, whose images stay where they are.
"""

import json
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.convert import SHARE, as_coco, read_source
from data.files import describe_kinds
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.files import write_whole, writing
from utils.names import printable
from utils.surroundings import a_path

UPRIGHT = "--opts DATA.UPRIGHT True"


def parse(arguments: list[str]) -> Namespace:
    parser = Parser(prog="scripts/voc_to_coco.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="FOLDER", type=a_path, help="folder of the data set")
    parser.add_argument(
        "--val-share", metavar="SHARE", type=float, help=f"of images to evaluate, where no file says; default: {SHARE}"
    )
    given = parser.parse_args(arguments)
    if given.val_share is not None and not 0 < given.val_share < 1:
        raise UserError(f"--val-share {given.val_share}: must lie between 0 and 1, for example {SHARE}")
    return given


def convert(arguments: list[str]) -> None:
    """Write the json of both parts."""
    given = parse(arguments)
    paths = {split: given.source / "annotations" / f"{split}.json" for split in ("train", "val")}
    for path in paths.values():
        if path.exists():
            raise UserError(f"{path} is there already; remove it to have it made again")
    source = read_source(given.source, given.val_share)
    for split, path in paths.items():
        content = as_coco(source.splits[split], source.classes)
        with writing(path, "give a copy of the data set where you may write"):
            write_whole(path, json.dumps(content).encode())
        print(f"{path}: {len(content['images']):,} images, {len(content['annotations']):,} objects")
    print(printable(f"{len(source.classes):,} classes: {', '.join(source.classes)}"))
    if source.left_out:
        print(f"left out: {describe_kinds(source.left_out)}")
    if source.turned:
        print(f"EXIF turns {source.turned:,} images, whose labels are of the upright ones: train with {UPRIGHT}")


main = partial(run_command, convert)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
