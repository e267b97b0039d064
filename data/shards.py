"""From a data set in any layout to tar shards, or to the zip files with map files that Swin-style trainers read.

What is whole already is kept, and the same settings always give the same bytes.
"""

import fcntl
import io
import json
import operator
import os
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.archive import ArchiveIndex
from data.dataset import read_item
from data.decoding import ORIENTATION, BadImage, Decoding, decode_with_orientation, jpeg_size, tensor_to_pil
from data.files import is_companion, is_image
from data.folder import FileIndex
from data.index import Index
from data.pair_tar import LABELS
from data.pairs import LabelMaps, decode_labels
from data.parts import PartOfIndex
from data.remote import Store
from data.sampling import epoch_order
from utils.errors import UserError
from utils.files import reason_of, remove_temporaries, replacing, writing
from utils.names import printable
from utils.processes import forked

IMAGES_PER_TASK = 64
"""Of a zip file: what a process hands over at a time."""
TASKS_AHEAD = 4
"""Of a zip file: so many for each process may wait to be written, which bounds the memory."""
LONGEST_PLAIN_NAME = 60
"""A header in a tar file holds 100 bytes of a name, the folders included."""
SECONDS_TO_WAIT_FOR_LOCK = 5
SETTINGS = "prepare.json"
"""Holds what the shards were made with."""
CARRIES_ON = "the same command carries on"
KILLED = f"a process was killed (out of memory?); {CARRIES_ON}"


class Recipe(NamedTuple):
    """What becomes of an image.

    Attributes:
        decoding: how pixels are made of a file; an upright image is turned for good.
        short_side: of larger images, in pixels; 0 for as it is.
        quality: of the JPEGs that are written anew.
        skip_bad: leave out what cannot be decoded; else that is an error.
    """

    decoding: Decoding
    short_side: int
    quality: int
    skip_bad: bool


class Split(NamedTuple):
    """A part of the source, the folder that each class gets, and what becomes of the images."""

    name: str
    index: Index  # type: ignore[assignment]  # a tuple's method of that name is not needed
    folders: list[str]
    recipe: Recipe


class Made(NamedTuple):
    """What was written: images, their bytes before and after, and lines about those that were left out."""

    images: int = 0
    before: int = 0
    after: int = 0
    skipped: tuple[str, ...] = ()

    def __add__(self, other: "Made") -> "Made":  # type: ignore[override]
        return Made(*map(operator.add, self, other))


class Prepared(NamedTuple):
    """An image as it goes into an archive, how many bytes it had before, and the names and bytes of files with it."""

    name: str
    label: int
    before: int
    data: bytes
    beside: tuple[tuple[str, bytes], ...] = ()


def begin_in_store(store: Store, settings: dict[str, Any]) -> None:
    """The same as :func:`begin` in object storage.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    there = store.files("")
    if SETTINGS in there:
        check_begun(json.loads(store.read(SETTINGS)), settings, store.url)
    elif there or any(store.files(name) for name in ("train", "val")):
        raise UserError(f"OUT {store.url} is not empty and was not begun by this script; choose another place")
    else:
        store.write(SETTINGS, json.dumps(settings, indent=1).encode())


def check_begun(begun: dict[str, Any], settings: dict[str, Any], out: Path | str) -> None:
    """Refuse to carry on with other settings."""
    begun = {"upright": False, "white": 0.0, "task": "classification"} | begun  # older ones knew of nothing else
    for key in settings:
        if begun.get(key) != settings[key]:
            raise UserError(f"{out} was begun with {key} {begun.get(key)}, not {settings[key]}; choose another OUT")


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder ``out``, or see that it was begun with the same settings.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    path = out / SETTINGS
    try:
        if path.exists():
            check_begun(json.loads(path.read_text()), settings, out)
        elif out.exists() and any(out.iterdir()):
            raise UserError(f"OUT {out} is not empty and was not begun by this script; choose another folder")
        else:
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=1))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """See to it that no other command writes there meanwhile, and remove what killed ones have left."""
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
        remove_temporaries(out, out / "train", out / "val")
        yield
    finally:
        os.close(handle)


def folders_of(classes: list[str], zipped: bool) -> list[str]:
    """Name a folder for each class, sorted as the classes are, since a reader of tar files numbers them so."""
    names = [name.replace("/", "_") for name in classes]
    if zipped:  # a line of the map file, and a name in the archive, must be text
        names = ["".join(letter if letter.isprintable() else "_" for letter in name) for name in names]
    if len(set(names)) == len(names) and (zipped or names == sorted(names)) and not any(map(is_companion, names)):
        return names
    return [f"{number:05d}_{name}" for number, name in enumerate(names)]


# ---- Files


def write_shards(split: Split, out: Path, size: int, workers: int, store: Store | None = None) -> Iterator[Made]:
    """Write ``out/SPLIT/SPLIT-00000.tar`` and so on, of ``size`` images each, in an order that mixes the classes.

    Each process makes whole shards. With a ``store`` each goes there as soon as it is whole, and ``out`` is emptied.
    """
    order = epoch_order(0, 0, len(split.index))
    paths = {
        out / split.name / f"{split.name}-{start // size:05d}.tar": order[start : start + size].tolist()
        for start in range(0, len(order), size)
    }
    with writing(out / split.name, CARRIES_ON):
        (out / split.name).mkdir(exist_ok=True)
    there = set(store.files(split.name)) if store else {path.name for path in paths if path.exists()}
    with forked(partial(write_shard, split, store), workers, KILLED) as submit:
        for task in as_completed([submit(shard) for shard in paths.items() if shard[0].name not in there]):
            yield task.result()


def write_shard(split: Split, store: Store | None, shard: tuple[Path, list[int]]) -> Made:
    """Write one tar file of the images with these numbers."""
    path, numbers = shard
    made = Made()
    with (
        writing(path, CARRIES_ON),
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for image in prepare(split, numbers):
            files = [(image.name, image.data), *image.beside] if isinstance(image, Prepared) else []
            for name, data in files:
                member = tarfile.TarInfo(f"{split.name}/{name}")  # so that a class may be called train
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            made += count(image)
    if store:
        store.put(path, f"{split.name}/{path.name}")
        path.unlink()
    return made


def write_zip(split: Split, out: Path, workers: int) -> Iterator[Made]:
    """Write ``out/SPLIT.zip``, stored, and ``out/SPLIT_map.txt``; processes prepare the images in order."""
    archive = out / f"{split.name}.zip"
    if archive.exists():
        return
    numbers = range(len(split.index))
    tasks = [numbers[i : i + IMAGES_PER_TASK] for i in range(0, len(numbers), IMAGES_PER_TASK)]
    ahead = TASKS_AHEAD * workers
    with (
        forked(partial(prepare_all, split), workers, KILLED) as submit,
        writing(archive, CARRIES_ON),
        replacing(archive) as file,
        replacing(out / f"{split.name}_map.txt") as lines,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as zipped,
    ):
        for first in range(0, len(tasks), ahead):
            for begun in [submit(task) for task in tasks[first : first + ahead]]:
                images = begun.result()
                for image in images:
                    if isinstance(image, Prepared):
                        zipped.writestr(zipfile.ZipInfo(image.name), image.data)
                        lines.write(f"{image.name}\t{image.label}\n".encode())
                yield sum(map(count, images), Made())


def prepare_all(split: Split, numbers: range) -> list[Prepared | str]:
    """Prepare all of these images, for another process."""
    return list(prepare(split, numbers))


def count(image: Prepared | str) -> Made:
    """Count an image alone."""
    return Made(skipped=(image,)) if isinstance(image, str) else Made(1, image.before, len(image.data))


# ---- Images


def prepare(split: Split, numbers: Iterable[int]) -> Iterator[Prepared | str]:
    """Prepare the images with these numbers; a line about each that cannot be decoded.

    Raises:
        UserError: that is not to be, or an image cannot be read.
    """
    index, recipe = split.index, split.recipe
    for i in numbers:
        try:
            if isinstance(index, LabelMaps):
                yield prepare_pair(index, i, recipe)
                continue
            source, label = read_item(index, i)
            data = shrink(source, recipe)
        except OSError as error:
            raise UserError(f"image {printable(index.name(i))}: {reason_of(error)}") from error
        except BadImage as error:
            line = printable(f"{index.name(i)}: {error}")
            if not recipe.skip_bad:
                raise UserError(f"image {line}; mend or remove it, or go on without it: --on-bad-image skip") from error
            yield line
        else:
            name = f"{split.folders[label]}/{visible(name_in_class(index, i))}"
            yield Prepared(name, label, len(source) if isinstance(source, bytes) else len(data), data)


def prepare_pair(index: LabelMaps, i: int, recipe: Recipe) -> Prepared:
    """Prepare an image and its label map, at the same size; one that is small enough stays as it is.

    Raises:
        BadImage: one of them cannot be decoded.
        OSError: one of them cannot be read.
    """
    source, labels = read_item(index, i)
    data, numbers = shrink(source, recipe), index.arrays["table"][decode_labels(labels)]
    if data is not source:
        height, width = decode_with_orientation(data, recipe.decoding)[0].shape[1:]
        numbers = F.resize(torch.from_numpy(numbers)[None], [height, width], InterpolationMode.NEAREST)[0].numpy()
    Image.fromarray(numbers).save(file := io.BytesIO(), "PNG", optimize=True)
    suffix = "jpg" if jpeg_size(data) else "png"
    return Prepared(f"{i:08d}.{suffix}", 0, len(source), data, ((f"{i:08d}{LABELS}", file.getvalue()),))


def shrink(data: bytes | Image.Image, recipe: Recipe) -> bytes:
    """Make a JPEG with a short side of at most ``recipe.short_side`` pixels of a file; one that is small enough stays.

    What is written anew keeps its EXIF orientation, so that DATA.UPRIGHT means the same for it as for the original;
    unless it is turned here, which happens to small ones too.
    """
    decoding, short_side = recipe.decoding, recipe.short_side
    encoded = data if isinstance(data, bytes) else None
    size = jpeg_size(encoded) if encoded is not None else None
    if encoded is not None and not decoding.upright and (not short_side or (size and min(size[:2]) <= short_side)):
        return encoded
    pixels, orientation = decode_with_orientation(data, decoding)
    height, width = pixels.shape[1:]
    turned, larger = decoding.upright and orientation > 1, short_side and min(height, width) > short_side
    if encoded is not None and not turned and not larger:
        return encoded
    if larger:
        pixels = F.resize(pixels, [short_side], InterpolationMode.BICUBIC, antialias=True)
    options: dict = {"quality": recipe.quality}
    if orientation > 1 and not turned:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    form = "JPEG" if short_side or size else "PNG"
    tensor_to_pil(pixels).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


# ---- Names


def name_in_class(index: Index, i: int) -> str:
    """Find the name that sorts image ``i`` within its class; no two images of a class have the same."""
    if isinstance(index, PartOfIndex):
        return name_in_class(index.whole, int(index.rows[i]))
    if isinstance(index, FileIndex):
        name = "".join(letter if letter.isprintable() else "?" for letter in index.name_in_class(i))
        stem, _, suffix = name.rpartition(".")
        return f"{stem}~{i:08d}.{suffix}" if "?" in name else name
    if not isinstance(index, ArchiveIndex):
        return f"{i:08d}.jpg"
    name = index.name_in_class(i)
    stem, _, suffix = name.rpartition(".")
    if not is_image(name):  # of a very long name the end is cut off
        stem, suffix = name, "jpg"
    repeated = i and index.labels[i] == index.labels[i - 1] and index.name_in_class(i - 1) == name
    return f"{stem}~{i:08d}.{suffix}" if repeated or is_ambiguous(name) else name


def visible(name: str) -> str:
    """Change a name where whoever reads the archive would take it for a hidden file."""
    return "/".join(f"_{part}" if is_companion(part) else part for part in name.split("/"))


def is_ambiguous(name: str) -> bool:
    """Tell whether other names may have become this one, because they were too long or held odd characters."""
    return "?" in name or "\ufffd" in name or len(os.fsencode(name)) > LONGEST_PLAIN_NAME
