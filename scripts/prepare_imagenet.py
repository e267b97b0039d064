"""Make tar shards of a data set in any layout that docs/data.md knows, or with --zip what Swin-style trainers read.

With --task segmentation it is a data set of images with label maps (docs/segmentation.md).

With --short-side larger images are resized, which halves the bytes and the time to decode them. The same command again
carries on where it was stopped, and the same command always gives the same bytes.
"""

import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.filesize import decimal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import CLASSES, PIXELS, build_config
from data.build import open_pairs
from data.decoding import build_decoding
from data.files import describe_left_out
from data.remote import Store, is_url, is_web, publish_index
from data.shards import Made, Recipe, Split, alone, begin, begin_in_store, folders_of, write_shards, write_zip
from data.splits import open_images
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.files import write_whole, writing
from utils.names import printable
from utils.progress import with_progress
from utils.surroundings import a_path

SETTINGS = ("DATA.UPRIGHT", "DATA.MAX_PIXELS", "DATA.WHITE")
"""What --opts may set."""


def parse(arguments: list[str]) -> Namespace:
    p = Parser(prog="scripts/prepare_imagenet.py", description=__doc__, allow_abbrev=False)
    p.add_argument("source", metavar="SOURCE", type=a_path, help="folder of the data set")
    p.add_argument(
        "out", metavar="OUT", help="folder to write to, or s3://BUCKET/FOLDER; a new one or one that was begun"
    )
    p.add_argument("--format", default="auto", help="layout of SOURCE, as DATA.FORMAT; default: %(default)s")
    p.add_argument("--task", choices=(CLASSES, PIXELS), default=CLASSES, help="default: %(default)s")
    p.add_argument("--zip", action="store_true", help="write train.zip, train_map.txt and val in place of shards")
    p.add_argument("--images-per-shard", metavar="N", type=int, default=2000, help="default: %(default)s")
    p.add_argument("--short-side", metavar="PIXELS", type=int, default=0, help="resize larger images, for example 320")
    p.add_argument("--quality", metavar="Q", type=int, default=92, help="of resized JPEGs; default: %(default)s")
    p.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="processes; default: all cores")
    p.add_argument("--opts", metavar="KEY VALUE", nargs="+", action="extend", default=[], help=f"{', '.join(SETTINGS)}")
    p.add_argument("--on-bad-image", choices=("error", "skip"), default="error", help="default: %(default)s")
    given = p.parse_args(arguments)
    ranges = {"images_per_shard": (1, 10**7), "short_side": (0, 10**5), "quality": (1, 100), "workers": (1, 1024)}
    for name, (low, high) in ranges.items():
        if not low <= getattr(given, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
    unused = [key for key in given.opts[::2] if key not in SETTINGS]
    if unused:
        raise UserError(f"--opts {unused[0]} changes nothing here; what does is {', '.join(SETTINGS)}")
    if given.task == PIXELS and (given.zip or given.format != "auto"):
        raise UserError("--zip and --format are for classification; leave them out with --task segmentation")
    if is_url(given.out):
        if given.zip or given.task == PIXELS:
            raise UserError(f"OUT {given.out}: to object storage go the shards of images with classes; give a folder")
        if is_web(given.out):
            raise UserError(f"OUT {given.out}: a web server is only read from; give a folder, and serve that")
    elif a_path(given.out).resolve().is_relative_to(given.source.resolve()):
        raise UserError(f"OUT {given.out} lies in SOURCE {given.source}; give a folder outside it")
    return given


def prepare(arguments: list[str]) -> None:
    """Write both splits; what is there already stays."""
    given = parse(arguments)
    opts = ["TASK", given.task, "DATA.DATA_PATH", str(given.source), "DATA.FORMAT", given.format, *given.opts]
    config = build_config(opts=opts)
    recipe = Recipe(build_decoding(config), given.short_side, given.quality, given.on_bad_image == "skip")
    train, val, classes = (open_pairs if given.task == PIXELS else open_images)(config, training=True)
    assert train is not None
    folders = folders_of(classes, given.zip)
    splits = [Split(name, index, folders, recipe) for name, index in (("train", train), ("val", val))]
    settings = {
        "source": str(given.source.resolve()), "format": given.format, "zip": given.zip,
        "images": {split.name: len(split.index) for split in splits}, "images_per_shard": given.images_per_shard,
        "short_side": given.short_side, "quality": given.quality, "upright": recipe.decoding.upright,
        "white": recipe.decoding.white, "task": given.task,
    }  # fmt: skip
    if left_out := describe_left_out({"train": train, "val": val}):
        print(left_out)
    if is_url(given.out):
        store = Store(given.out)
        begin_in_store(store, settings)
        with TemporaryDirectory() as staging:
            write_splits(given, splits, Path(staging), store)
        publish_index(store)
    else:
        out = a_path(given.out)
        begin(out, settings)
        if given.task == PIXELS:
            with writing(out / "classes.txt", "choose another OUT"):
                write_whole(out / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
        write_splits(given, splits, out, None)
    name = "segmentation/upernet_small" if given.task == PIXELS else "small"
    print(f"\nTrain on it:\n    python main.py --cfg configs/{name}.yaml --data-path {given.out}")


def write_splits(given: Namespace, splits: list[Split], out: Path, store: Store | None) -> None:
    """Write what is not there yet, and say how much that was."""
    for split in splits:
        with alone(out):
            if given.zip:
                parts = write_zip(split, out, given.workers)
            else:
                parts = write_shards(split, out, given.images_per_shard, given.workers, store)
            parts = with_progress(parts, split.name, len(split.index), lambda made: made.images + len(made.skipped))
            total = sum(parts, Made())
        for line in total.skipped:
            print(f"left out: {printable(line)}")
        print(f"{split.name}: {total.images:,} images written now, {decimal(total.before)} -> {decimal(total.after)}")


main = partial(run_command, prepare, stopped="stopped; the same command carries on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
