"""Reading COCO's json: its images, categories and objects, checked one by one and turned into flat arrays.

Whatever is wrong in a file is an error of one line that names the file, what is wrong in it, and the remedy.
"""

import json
import os
from collections import Counter
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn

import numpy as np
from pycocotools import mask as rle

from data.files import NO_EXTENT
from utils.errors import UserError
from utils.files import reason_of

PARTS = "images", "annotations", "categories"
MOST_PIXELS, LARGEST_ID, LARGEST_AREA = 2**31, 2**62, 1e18
FARTHEST = 8
"""A polygon may reach so many times the image's longer side away from it; pycocotools walks along every edge."""
LEAST_NUMBERS = 6
"""Of a polygon: x and y of three points."""


class Images(NamedTuple):
    """The images of a file, in the order of their ids.

    Attributes:
        ids: ``(N,)`` int64.
        names: as the file has them.
        sizes: height and width, ``(N, 2)`` int64.
    """

    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray


class Category(NamedTuple):
    """A class of objects."""

    id: int
    name: str


class Object(NamedTuple):
    """One object: the number of its image among :class:`Images`, its class, and what the annotation says."""

    image: int
    label: int
    box: list[float]
    crowd: bool
    area: float
    segment: bytes


class AnnotationFile:
    """A file in COCO's format.

    Raises:
        UserError: it cannot be read, is no json or not COCO's. The methods raise it too, of what they read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
        except (ValueError, RecursionError) as error:  # ValueError is that of json, of encodings and of endless numbers
            self.fail(f"it is not whole json ({reason_of(error)})", "copy or export it again")
        missing = [key for key in PARTS if not isinstance(content, dict) or key not in content]
        if missing:
            what = f"lacks {', '.join(missing)}" if isinstance(content, dict) else f"is a {type(content).__name__}"
            self.fail(f"it is not in COCO's format: it {what}", "export it as COCO json with images and categories")
        self.content = content

    def fail(self, problem: str, remedy: str) -> NoReturn:
        """Raise the error about this file."""
        raise UserError(f"{self.path}: {problem}; {remedy}")

    def entries(self, key: str) -> list[dict[str, Any]]:
        """Give the list ``key``, which must hold dicts."""
        entries = self.content[key]
        if not isinstance(entries, list):
            self.fail(f"{key} is not a list", "export it again as COCO json")
        for entry in entries:
            if not isinstance(entry, dict):
                self.fail(f"{key} has {shown(entry)}, which is not a dict", "export it again as COCO json")
        if not entries:
            self.fail(f"it has no {key} at all", f"give a file with {key}, or another folder")
        return entries

    def whole(self, entry: dict[str, Any], key: str, what: str) -> int:
        """Give a whole number in an entry."""
        value = entry.get(key)
        if type(value) is not int or abs(value) > LARGEST_ID:
            has = f"has {key} {shown(value)}" if key in entry else f"has no {key}"
            self.fail(f"{what} {has}", "it must be a whole number")
        return value

    def categories(self) -> list[Category]:
        """Give the classes in the order of their ids."""
        names: dict[int, str] = {}
        for entry in self.entries("categories"):
            number, name = self.whole(entry, "id", f"category {shown(entry.get('name'))}"), entry.get("name")
            if not isinstance(name, str) or not name.strip():
                self.fail(f"category {number} has the name {shown(name)}", "give it a name")
            if number in names:
                self.fail(f"category id {number} stands twice", "give each category an id of its own")
            if name in names.values():
                self.fail(f"category {shown(name)} stands twice", "keep one, with all of its objects")
            names[number] = name
        return [Category(number, names[number]) for number in sorted(names)]

    def images(self) -> Images:
        """Give the images in the order of their ids."""
        found: dict[int, tuple[str, int, int]] = {}
        for entry in self.entries("images"):
            name = entry.get("file_name")
            number = self.whole(entry, "id", f"image {shown(name)}")
            if number in found:
                self.fail(f"image id {number} stands twice", "give each image an id of its own")
            found[number] = self._name(name, number), *self._size(entry, f"image {number} ({shown(name)})")
        ids = sorted(found)
        sizes = np.array([found[number][1:] for number in ids], dtype=np.int64)
        return Images(np.array(ids, dtype=np.int64), [found[number][0] for number in ids], sizes)

    def _name(self, name: Any, number: int) -> str:
        try:
            valid = isinstance(name, str) and os.fsencode(name).strip() and "\0" not in name
        except UnicodeEncodeError:
            valid = False
        if not valid:
            self.fail(f"image {number} has the file_name {shown(name)}", "give the path of its file")
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            self.fail(
                f"the file_name {shown(name)} of image {number} leaves the folder of the images",
                "give it relative to that folder",
            )
        return name

    def _size(self, entry: dict[str, Any], what: str) -> tuple[int, int]:
        height, width = (self.whole(entry, key, what) for key in ("height", "width"))
        if min(height, width) < 1 or height * width > MOST_PIXELS:
            self.fail(f"{what} is said to be {width} wide and {height} high", "give its size in pixels")
        return height, width

    def objects(self, images: Images, categories: list[Category]) -> tuple[dict[str, np.ndarray], Counter[str]]:
        """Give the objects in the order of their images, and how many were left out and why.

        Returns:
            ``offsets`` ``(N + 1,)`` of each image's objects among the n of all; ``boxes`` ``(n, 4)`` float32, x1 y1 x2
            y2 within the image; ``object_labels`` ``(n,)`` int32; ``crowd`` ``(n,)`` bool; ``area`` ``(n,)`` float32;
            ``segments``, bytes of COCO's compressed run lengths, and their ``segment_ends`` ``(n,)``.
        """
        row_of = {number: row for row, number in enumerate(images.ids.tolist())}
        label_of = {category.id: label for label, category in enumerate(categories)}
        sizes, seen, found = images.sizes.tolist(), set[int](), list[Object]()
        entries = self.entries("annotations")
        for entry in entries:
            number = self.whole(entry, "id", f"an annotation of image {shown(entry.get('image_id'))}")
            if number in seen:
                self.fail(f"annotation id {number} stands twice", "give each annotation an id of its own")
            seen.add(number)
            if one := self._object(entry, row_of, label_of, sizes):
                found.append(one)
        if not found:
            self.fail("all of its boxes are of no width or height", "give x, y, width and height in pixels")
        left_out = Counter({NO_EXTENT: len(entries) - len(found)} if len(found) < len(entries) else {})
        return as_arrays(sorted(found, key=lambda one: one.image), len(images.ids)), left_out

    def _object(
        self, entry: dict[str, Any], row_of: dict[int, int], label_of: dict[int, int], sizes: list[list[int]]
    ) -> Object | None:
        what = f"annotation {entry['id']}"
        row = row_of.get(self.whole(entry, "image_id", what))
        if row is None:
            self.fail(f"{what} is of image {entry['image_id']}, which is not in the file", "add the image or remove it")
        label = label_of.get(self.whole(entry, "category_id", what))
        if label is None:
            self.fail(f"{what} is of the unknown category {entry['category_id']}", "add it to the categories")
        what, (height, width) = f"{what} of image {entry['image_id']}", sizes[row]
        box, crowd, area = self._box(entry, what, height, width), self._crowd(entry, what), self._area(entry, what)
        segment = self._segment(entry.get("segmentation"), what, height, width)
        if box is None:
            return None
        return Object(row, label, box, crowd, entry["bbox"][2] * entry["bbox"][3] if area is None else area, segment)

    def _box(self, entry: dict[str, Any], what: str, height: int, width: int) -> list[float] | None:
        """Give x1, y1, x2, y2 within the image; None of a box that has no width or height there."""
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(value, MOST_PIXELS) for value in box):
            self.fail(f"{what} has the bbox {shown(box)}", "it must be four numbers: x, y, width, height")
        x, y, w, h = box
        if w < 0 or h < 0:
            self.fail(f"{what} has the bbox {shown(box)} with a negative size", "it must be x, y, width, height")
        if w and h and (x >= width or y >= height or x + w <= 0 or y + h <= 0):
            self.fail(
                f"{what} has the bbox {shown(box)}, wholly outside of the image of {width} x {height}",
                "give x, y, width and height in pixels",
            )
        corners = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
        clipped = np.array(corners, dtype=np.float32).tolist()
        return clipped if clipped[2] > clipped[0] and clipped[3] > clipped[1] else None

    def _crowd(self, entry: dict[str, Any], what: str) -> bool:
        value = entry.get("iscrowd", 0)
        if not isinstance(value, int) or value not in (0, 1):
            self.fail(f"{what} has iscrowd {shown(value)}", "it must be 0 or 1")
        return bool(value)

    def _area(self, entry: dict[str, Any], what: str) -> float | None:
        value = entry.get("area")
        if value is not None and not (is_number(value, LARGEST_AREA) and value >= 0):
            self.fail(f"{what} has the area {shown(value)}", "it must be a number of pixels")
        return value

    def _segment(self, value: Any, what: str, height: int, width: int) -> bytes:
        """Give the compressed run lengths of a mask; none where there is none."""
        if value is None or value == []:
            return b""
        try:
            if isinstance(value, dict):
                return run_lengths_as_bytes(value, height, width)
            return polygons_as_bytes(value, height, width)
        except ValueError as error:
            self.fail(f"the segmentation of {what} {error}", "mend it, or leave it out for boxes alone")


def as_arrays(objects: list[Object], images: int) -> dict[str, np.ndarray]:
    """Turn objects, in the order of their images, into the arrays of :meth:`AnnotationFile.objects`."""
    counts = np.bincount([one.image for one in objects], minlength=images)
    return {
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes": np.array([one.box for one in objects], dtype=np.float32),
        "object_labels": np.array([one.label for one in objects], dtype=np.int32),
        "crowd": np.array([one.crowd for one in objects], dtype=bool),
        "area": np.array([one.area for one in objects], dtype=np.float32),
        "segments": np.frombuffer(b"".join(one.segment for one in objects), dtype=np.uint8),
        "segment_ends": np.cumsum([len(one.segment) for one in objects], dtype=np.int64),
    }


def is_number(value: Any, limit: float) -> bool:
    """Tell whether a value is a finite number of at most this size."""
    return type(value) in (int, float) and -limit <= value <= limit


def are_numbers(values: list[Any], limit: float) -> bool:
    """Tell the same of each in a list; numpy does so much faster."""
    try:
        numbers = np.array(values)
    except ValueError:  # lists of different lengths in it
        return False
    return numbers.dtype.kind in "if" and numbers.ndim == 1 and bool(((numbers >= -limit) & (numbers <= limit)).all())


def shown(value: Any) -> str:
    """Show a value of a file in an error, on one line."""
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def polygons_as_bytes(polygons: Any, height: int, width: int) -> bytes:
    """Fill polygons as COCO does; they become compressed run lengths.

    Raises:
        ValueError: they are none; the message goes on from "the segmentation".
    """
    if not isinstance(polygons, list):
        raise ValueError(f"is {shown(polygons)}, neither polygons nor run lengths")
    limit = FARTHEST * max(height, width)
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or len(polygon) < LEAST_NUMBERS:
            count = f"of {len(polygon)} numbers" if isinstance(polygon, list) else shown(polygon)
            raise ValueError(f"has a polygon {count}; x and y of three points or more make one")
        if not are_numbers(polygon, limit):
            raise ValueError("has a polygon with what is no number, or far outside of the image")
    return rle.merge(rle.frPyObjects(polygons, height, width))["counts"]


def run_lengths_as_bytes(mask: dict[str, Any], height: int, width: int) -> bytes:
    """Check run lengths, compressed or not, and compress them.

    Raises:
        ValueError: they are damaged or of another size; the message goes on from "the segmentation".
    """
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width]:
        raise ValueError(f"is of size {shown(size)}, the image [{height}, {width}]")
    if isinstance(counts, str) and counts.isascii():
        runs = read_run_lengths(counts.encode())
    elif isinstance(counts, list) and counts and all(type(run) is int and 0 <= run <= MOST_PIXELS for run in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(f"has the counts {shown(counts)}, which are no run lengths")
    if runs.min() < 0 or runs.sum() != height * width:
        raise ValueError(f"has run lengths of another number of pixels than {height} x {width}")
    return counts.encode() if isinstance(counts, str) else rle.frPyObjects(mask, height, width)["counts"]


def read_run_lengths(counts: bytes) -> np.ndarray:
    """Read COCO's compressed run lengths: numbers of 5 bits a byte, from the fourth on less the one before the last.

    pycocotools reads whatever bytes there are, beyond their end too; so they are checked first.

    Raises:
        ValueError: they are damaged.
    """
    values = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((values & 32) == 0)
    if not len(values) or values.min() < 0 or values.max() > 63 or not len(ends) or ends[-1] != len(values) - 1:
        raise ValueError("has damaged run lengths")
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(values)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 6:
        raise ValueError("has damaged run lengths")
    runs = np.add.reduceat((values & 31) << (5 * places), starts)
    runs -= np.where(values[ends] & 16, 1 << (5 * (places[ends] + 1)), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
