"""Make tar shards of a data set in any layout that docs/data.md knows, or with --zip what Swin-style trainers read.

With --short-side larger images are resized, which halves the bytes and the time to decode them. The same command again
carries on where it was stopped, and the same command always gives the same bytes.
"""

import argparse
import fcntl
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import build_config
from data.archive import ArchiveIndex, class_and_name
from data.build import open_images
from data.decoding import ORIENTATION, Decoding, build_decoding, decode_with_orientation, jpeg_size, tensor_to_pil
from data.files import describe_left_out, is_companion, is_image
from data.folder import FileIndex
from data.index import Index
from data.sampling import epoch_order
from utils.errors import Parser, UserError, say_error
from utils.names import printable
from utils.processes import CTRL_C_STATUS
from utils.surroundings import a_path, settle

SETTINGS = ("DATA.UPRIGHT", "DATA.MAX_PIXELS", "DATA.WHITE")
"""What --opts may set."""
IMAGES_PER_TASK = 64
"""With --zip: what a process hands over at a time."""
LONGEST_PLAIN_NAME = 60
"""A header in a tar file holds 100 bytes of a name, the folders included."""
SECONDS_BETWEEN_LINES = 30
SECONDS_TO_WAIT_FOR_LOCK = 5
TASKS_AHEAD = 4
"""With --zip: so many for each process may wait to be written, which bounds the memory."""


def main(arguments: list[str]) -> int:
    settle()
    try:
        options = parse(arguments)
        prepare(options)
    except UserError as error:
        say_error(error)
        return 2
    except BrokenProcessPool:
        print("error: a process was killed (out of memory?); the same command carries on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command carries on", file=sys.stderr)
        return CTRL_C_STATUS
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    p = Parser(prog="scripts/prepare_imagenet.py", description=__doc__, allow_abbrev=False)
    p.add_argument("source", metavar="SOURCE", type=a_path, help="folder of the data set")
    p.add_argument("out", metavar="OUT", type=a_path, help="folder to write to, a new one or one that was begun")
    p.add_argument("--format", default="auto", help="layout of SOURCE, as DATA.FORMAT; default: %(default)s")
    p.add_argument("--zip", action="store_true", help="write train.zip, train_map.txt and val in place of shards")
    p.add_argument("--images-per-shard", metavar="N", type=int, default=2000, help="default: %(default)s")
    p.add_argument("--short-side", metavar="PIXELS", type=int, default=0, help="resize larger images, for example 320")
    p.add_argument("--quality", metavar="Q", type=int, default=92, help="of resized JPEGs; default: %(default)s")
    p.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="processes; default: all cores")
    p.add_argument("--opts", metavar="KEY VALUE", nargs="+", action="extend", default=[], help=f"{', '.join(SETTINGS)}")
    p.add_argument("--on-bad-image", choices=("error", "skip"), default="error", help="default: %(default)s")
    options = p.parse_args(arguments)
    for name, low, high in (("images_per_shard", 1, 10**7), ("short_side", 0, 10**5), ("quality", 1, 100),
                            ("workers", 1, 1024)):  # fmt: skip
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
    unused = [key for key in options.opts[::2] if key not in SETTINGS]
    if unused:
        raise UserError(f"--opts {unused[0]} changes nothing here; what does is {', '.join(SETTINGS)}")
    if options.out.resolve().is_relative_to(options.source.resolve()):
        raise UserError(f"OUT {options.out} lies in SOURCE {options.source}; give a folder outside it")
    return options


class Split(NamedTuple):
    """A part of the source, and the folder that each class gets in OUT."""

    name: str
    images: Index
    folders: list[str]


class Made(NamedTuple):
    """What went into a file: images, their bytes before and after, and lines about those that were left out."""

    images: int
    before: int
    after: int
    skipped: list[str]


def prepare(options: argparse.Namespace) -> None:
    """Write both splits; what is there already stays."""
    opts = ["DATA.DATA_PATH", str(options.source), "DATA.FORMAT", options.format, *options.opts]
    config = build_config(opts=opts)
    options.decoding = build_decoding(config)
    train, val, classes = open_images(config, training=True)
    splits = [Split(name, images, folders_of(classes, options)) for name, images in (("train", train), ("val", val))]
    begin(options, {split.name: len(split.images) for split in splits})
    if left_out := describe_left_out({split.name: split.images for split in splits}):
        print(left_out)
    write = write_zip if options.zip else write_shards
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    for split in splits:
        total, said = Made(0, 0, 0, []), time.monotonic()
        with alone(options.out), Progress(*columns) as progress:
            bar = progress.add_task(split.name, total=len(split.images), speed="")
            for made in write(split, options):
                total = Made(*(a + b for a, b in zip(total, made, strict=True)))
                speed = f"{total.images / (progress.tasks[bar].elapsed or 1):,.0f} images/s"
                progress.update(bar, advance=made.images + len(made.skipped), speed=speed)
                if not progress.console.is_terminal and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    print(f"{split.name}: {total.images:,} of {len(split.images):,} images, {speed}", flush=True)
            progress.update(bar, completed=len(split.images))
        for line in total.skipped:
            print(f"left out: {printable(line)}")
        print(f"{split.name}: {total.images:,} images written now, {decimal(total.before)} -> {decimal(total.after)}")
    print(f"\nTrain on it:\n    python main.py --cfg configs/small.yaml --data-path {options.out}")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """See to it that no other command writes there meanwhile."""
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for _ in range(SECONDS_TO_WAIT_FOR_LOCK * 10):  # what is left of a command that was killed ends soon
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        else:
            raise UserError(f"another command writes to {out}; wait until it has ended, or choose another OUT")
        yield
    finally:
        os.close(handle)


def folders_of(classes: list[str], options: argparse.Namespace) -> list[str]:
    """Names whose sorted order is that of the classes, since a reader of tar files numbers them so."""
    names = [name.replace("/", "_") for name in classes]
    if options.zip:  # a line of the map file, and a name in the archive, must be text
        names = ["".join(letter if letter.isprintable() else "_" for letter in name) for name in names]
    if len(set(names)) == len(names) and (options.zip or names == sorted(names)) and not any(map(is_companion, names)):
        return names
    return [f"{number:05d}_{name}" for number, name in enumerate(names)]


def begin(options: argparse.Namespace, images: dict[str, int]) -> None:
    """Make OUT, or see that it was begun by the same command."""
    settings = {
        "source": str(options.source.resolve()), "format": options.format, "zip": options.zip, "images": images,
        "images_per_shard": options.images_per_shard, "short_side": options.short_side, "quality": options.quality,
        "upright": options.decoding.upright, "white": options.decoding.white,
    }  # fmt: skip
    path = options.out / "prepare.json"
    try:
        if path.exists():
            begun = json.loads(path.read_text())
            begun = {"upright": False, "white": 0.0} | begun  # older ones knew of nothing else
            different = [key for key in settings if begun.get(key) != settings[key]]
            if different:
                key = different[0]
                raise UserError(
                    f"{options.out} was begun with {key} {begun.get(key)}, not {settings[key]}; choose another OUT"
                )
        elif options.out.exists() and any(options.out.iterdir()):
            raise UserError(f"OUT {options.out} is not empty and was not begun by this script; choose another folder")
        else:
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=1))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {getattr(error, 'strerror', None) or error}") from error


# ---- shards


def write_shards(split: Split, options: argparse.Namespace) -> Iterator[Made]:
    """OUT/SPLIT/SPLIT-00000.tar and so on; each process makes whole shards, in an order that mixes the classes."""
    order, size = epoch_order(0, 0, len(split.images)), options.images_per_shard
    folder = options.out / split.name
    with writing(folder):
        folder.mkdir(exist_ok=True)
    with processes(split, options) as pool:
        begun = [
            pool.submit(write_shard, order[start : start + size].tolist(), path, options)
            for start in range(0, len(order), size)
            if not (path := folder / f"{split.name}-{start // size:05d}.tar").exists()
        ]
        yield from results(as_completed(begun))


def write_shard(numbers: list[int], path: Path, options: argparse.Namespace) -> Made:
    """One tar file, under its name once it is whole."""
    images, before, after, skipped = 0, 0, 0, []
    unfinished = path.with_suffix(".unfinished")
    with writing(path), open(unfinished, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for image in prepared(numbers, options, skipped):
                member = tarfile.TarInfo(f"{_split.name}/{image.name}")  # so that a class may be called train
                member.size = len(image.data)
                tar.addfile(member, io.BytesIO(image.data))
                images, before, after = images + 1, before + image.before, after + member.size
        finish(file, unfinished, path)
    return Made(images, before, after, skipped)


# ---- zip files


def write_zip(split: Split, options: argparse.Namespace) -> Iterator[Made]:
    """OUT/SPLIT.zip, stored, and OUT/SPLIT_map.txt; processes prepare the images and this one writes them in order."""
    archive, map_file = options.out / f"{split.name}.zip", options.out / f"{split.name}_map.txt"
    if archive.exists():
        return
    unfinished = archive.with_suffix(".unfinished")
    size = IMAGES_PER_TASK * TASKS_AHEAD * options.workers
    with processes(split, options) as pool, writing(archive), open(unfinished, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zipped, open(map_file, "w", encoding="utf-8") as lines:
            for first in range(0, len(split.images), size):
                numbers = range(first, min(first + size, len(split.images)))
                tasks = [pool.submit(prepare_some, numbers[i : i + IMAGES_PER_TASK], options)
                         for i in range(0, len(numbers), IMAGES_PER_TASK)]  # fmt: skip
                for images, skipped in results(tasks):
                    for image in images:
                        zipped.writestr(zipfile.ZipInfo(image.name), image.data)
                        lines.write(f"{image.name}\t{image.label}\n")
                    yield total_of(images, skipped)
        finish(file, unfinished, archive)


def prepare_some(numbers: range, options: argparse.Namespace) -> tuple[list["Prepared"], list[str]]:
    skipped: list[str] = []
    return list(prepared(numbers, options, skipped)), skipped


# ---- images


class Prepared(NamedTuple):
    """An image as it goes into an archive, and how many bytes it had before."""

    name: str
    label: int
    before: int
    data: bytes


def total_of(images: list[Prepared], skipped: list[str]) -> Made:
    return Made(len(images), sum(i.before for i in images), sum(len(i.data) for i in images), skipped)


def prepared(numbers: Iterable[int], options: argparse.Namespace, skipped: list[str]) -> Iterator[Prepared]:
    """The images; lines about those that cannot be decoded are added to ``skipped``."""
    split = _split
    for i in numbers:
        try:
            source, label = split.images[i]
            data = shrunk(source, options.short_side, options.quality, options.decoding)
        except UserError:
            raise
        except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
            if getattr(error, "errno", None):  # it is not the image that is bad
                raise UserError(f"image {printable(split.images.name(i))}: {error.strerror}") from error
            line = printable(f"{split.images.name(i)}: {str(error) or type(error).__name__}")
            if options.on_bad_image == "error":
                raise UserError(f"image {line}; mend or remove it, or go on without it: --on-bad-image skip") from error
            skipped.append(line)
        else:
            name = f"{split.folders[label]}/{visible(name_in_class(split.images, i))}"
            yield Prepared(name, label, len(source) if isinstance(source, bytes) else len(data), data)


def shrunk(data: bytes | Image.Image, short_side: int, quality: int, decoding: Decoding) -> bytes:
    """The file with a short side of at most ``short_side`` pixels, as JPEG; one that is small enough as it is.

    What is written anew keeps its EXIF orientation, so that DATA.UPRIGHT means the same for it as for the original;
    unless it is turned here, which happens to small ones too.
    """
    is_file = isinstance(data, bytes)
    size = jpeg_size(data) if is_file else None
    if is_file and not decoding.upright and (not short_side or (size and min(size[:2]) <= short_side)):
        return data
    pixels, orientation = decode_with_orientation(data, decoding)
    height, width = pixels.shape[1:]
    turned, larger = decoding.upright and orientation > 1, short_side and min(height, width) > short_side
    if is_file and not turned and not larger:
        return data
    if larger:
        pixels = F.resize(pixels, [short_side], InterpolationMode.BICUBIC, antialias=True)
    options: dict = {"quality": quality}
    if orientation > 1 and not turned:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    form = "JPEG" if short_side or size else "PNG"
    tensor_to_pil(pixels).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def name_in_class(images: Index, i: int) -> str:
    """The name that sorts image ``i`` within its class; no two images of a class have the same."""
    if isinstance(images, FileIndex):
        name = "".join(letter if letter.isprintable() else "?" for letter in images.name_in_class(i))
        stem, _, suffix = name.rpartition(".")
        return f"{stem}~{i:08d}.{suffix}" if "?" in name else name
    if not isinstance(images, ArchiveIndex):
        return f"{i:08d}.jpg"
    name = member_in_class(images, i)
    stem, _, suffix = name.rpartition(".")
    if not is_image(name):  # of a very long name the end is cut off
        stem, suffix = name, "jpg"
    repeated = i and images.labels[i] == images.labels[i - 1] and member_in_class(images, i - 1) == name
    return f"{stem}~{i:08d}.{suffix}" if repeated or is_ambiguous(name) else name


def visible(name: str) -> str:
    """The name, changed where whoever reads the archive would take it for a hidden file."""
    return "/".join(f"_{part}" if is_companion(part) else part for part in name.split("/"))


def member_in_class(images: ArchiveIndex, i: int) -> str:
    """The name in the archive, without the folder of the class if it has one."""
    member = images.member(i)
    folder, name = class_and_name(member)
    return name if not folder or folder == images.classes[images.labels[i]] else member


def is_ambiguous(name: str) -> bool:
    """Whether other names may have been turned into this one, because they were too long or held odd characters."""
    return "?" in name or "\ufffd" in name or len(os.fsencode(name)) > LONGEST_PLAIN_NAME


# ---- processes and files


_split: Split
"""What the processes work on: they are forked with it, so that they share the index and what it has open."""


@contextmanager
def processes(split: Split, options: argparse.Namespace) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this one, whatever ends it."""
    pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("fork"), start_worker, (split,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(split: Split) -> None:
    global _split
    _split = split
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a live bar's stand-ins hold a lock that was copied locked
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def results(tasks: Iterable[Future]) -> Iterator:
    for task in tasks:
        yield task.result()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; the same command carries on") from error


def finish(file: BinaryIO, unfinished: Path, path: Path) -> None:
    """Give the file its name once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(unfinished, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
