"""Images with objects in COCO's format: boxes, classes and masks in one json for each split."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from pycocotools import mask as rle

from data.coco_json import AnnotationFile, Images, shown
from data.decoding import read_file
from data.index import ImageIndex, Layout, Scan
from utils.errors import UserError

SCAN_THREADS = 16
ANNOTATIONS = (
    "annotations/instances_{split}2017.json", "annotations/instances_{split}.json", "annotations/{split}.json",
    "{split}.json",
)  # fmt: skip
FOLDERS = "{split}2017", "images/{split}2017", "images/{split}", "{split}", "images", ""
"""Below which an image's file_name is looked for; the last is the data set's own."""
BESIDE = "_annotations.coco.json"
"""Annotations that lie beside their images in the folder of a split, as Roboflow exports them."""
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid")}
EXPECTED = (
    "annotations/instances_{split}2017.json with {split}2017, or annotations/{split}.json (or {split}.json) with "
    "images/{split}, {split} or images, or {split}/_annotations.coco.json beside the images"
)


class Objects(NamedTuple):
    """The n objects of an image; its arrays are views of the index.

    Attributes:
        boxes: ``(n, 4)`` float32, x1 y1 x2 y2.
        labels: classes, ``(n,)`` int32.
        crowd: ``(n,)`` bool: a group that counts neither as found nor as missed.
        segments: COCO's compressed run lengths of the masks in a row, uint8.
        segment_ends: where each one's end, ``(n + 1,)`` from 0 on. One without bytes has no mask.
        size: height and width of the image, as the annotations have it.
        image_id: of the image in the annotations.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segments: np.ndarray
    segment_ends: np.ndarray
    size: tuple[int, int]
    image_id: int

    def masks(self, chosen: Iterable[int]) -> np.ndarray:
        """Decode the masks of some objects, ``(n, height, width)`` uint8 of 0 and 1."""
        data, ends = self.segments, self.segment_ends
        encoded = [{"size": self.size, "counts": data[ends[i] : ends[i + 1]].tobytes()} for i in chosen]
        if not encoded:
            return np.zeros((0, *self.size), dtype=np.uint8)
        return np.ascontiguousarray(rle.decode(encoded).transpose(2, 0, 1))


class ObjectIndex(ImageIndex):
    """Images with objects: ``index[i]`` is the bytes of an image, and its :class:`Objects`.

    ``arrays`` holds the ``names`` of the images' files and their ``ends``, ``image_ids``, ``sizes`` and
    ``category_ids``, and the objects of :meth:`data.coco_json.AnnotationFile.objects`. ``labels`` are all 0: it is
    objects that have classes here.

    Attributes:
        rows: the images of the arrays that it has, ``(N,)``; None for all.
    """

    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.rows is None else len(self.rows)

    def __getitem__(self, i: int) -> tuple[bytes, Objects]:
        return self.read(i), self.objects(i)

    def __reduce__(self):
        return (_selected, (super().__reduce__(), self.rows)) if self.rows is not None else super().__reduce__()

    def row(self, i: int) -> int:
        """Give the place of image ``i`` in the arrays."""
        return i if self.rows is None else int(self.rows[i])

    def select(self, rows: np.ndarray) -> Self:
        """Copy the index with some of the images of its arrays only."""
        copy = self._copy(self.classes, self.labels)
        copy.rows = rows
        return copy

    def objects(self, i: int) -> Objects:
        """Give the objects of image ``i``."""
        arrays, row = self.arrays, self.row(i)
        first, last = arrays["offsets"][row : row + 2].tolist()
        ends, size = arrays["segment_ends"], arrays["sizes"][row].tolist()
        start = int(ends[first - 1]) if first else 0
        ends = np.concatenate([[start], ends[first:last]])
        return Objects(
            arrays["boxes"][first:last],
            arrays["object_labels"][first:last],
            arrays["crowd"][first:last],
            arrays["segments"][start : ends[-1]],
            ends - start,
            (size[0], size[1]),
            int(arrays["image_ids"][row]),
        )

    @property
    def image_ids(self) -> np.ndarray:
        """The ids of the images in the annotations, ``(N,)`` int64."""
        return self._of_images("image_ids")

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, ``(N, 2)`` int64."""
        return self._of_images("sizes")

    @property
    def category_ids(self) -> np.ndarray:
        """The ids of the classes in the annotations, in the order of ``classes``, int64."""
        return self.arrays["category_ids"]

    @property
    def annotation_file(self) -> Path:
        """The json that all this was read from."""
        return self.root / self.archives[0]

    @property
    def counts(self) -> np.ndarray:
        """How many objects that are no crowds each image has, ``(N,)`` int64."""
        before = np.concatenate([[0], np.cumsum(~self.arrays["crowd"])])
        counts = np.diff(before[self.arrays["offsets"]])
        return counts if self.rows is None else counts[self.rows]

    @property
    def without_mask(self) -> int:
        """How many objects that are no crowds have no mask."""
        return int(((np.diff(self.arrays["segment_ends"], prepend=0) == 0) & ~self.arrays["crowd"]).sum())

    @property
    def has_masks(self) -> bool:
        """Whether every object that is no crowd has a mask."""
        return self.without_mask == 0

    def _of_images(self, key: str) -> np.ndarray:
        return self.arrays[key] if self.rows is None else self.arrays[key][self.rows]

    def path(self, i: int) -> Path:
        """Give the path of image ``i``."""
        row, names, ends = self.row(i), self.arrays["names"], self.arrays["ends"]
        return self.root / os.fsdecode(names[ends[row - 1] if row else 0 : ends[row]].tobytes())

    def read(self, i: int) -> bytes:
        return read_file(self.path(i))

    def name(self, i: int) -> str:
        return str(self.path(i))


def _selected(reopen: tuple, rows: np.ndarray) -> ObjectIndex:
    function, arguments = reopen
    return function(*arguments).select(rows)


class CocoLayout(Layout):
    """One split in COCO's format.

    Args:
        root: the folder of the data set.
        split: train or val.
        annotations: its json.
    """

    index_class = ObjectIndex

    def __init__(self, root: Path, split: str, annotations: Path):
        self.root, self.name, self.archives, self.split = root, f"{split}-coco", [annotations], split

    def classes(self, cache_dir: str) -> list[str]:
        return [category.name for category in AnnotationFile(self.archives[0]).categories()]

    def scan(self) -> Scan:
        file = AnnotationFile(self.archives[0])
        categories, images = file.categories(), file.images()
        beside, folders = file.path.name == BESIDE, [self.root / folder.format(split=self.split) for folder in FOLDERS]
        folders = [file.path.parent] if beside else folders
        names = [os.fsencode(name) for name in self._paths(images, folders, file)]
        objects, left_out = file.objects(images, categories)
        arrays: dict[str, np.ndarray] = {
            "labels": np.zeros(len(images.ids), dtype=np.int32),
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            "image_ids": images.ids,
            "sizes": images.sizes,
            "category_ids": np.array([category.id for category in categories], dtype=np.int64),
            **objects,
        }
        archives = [os.path.relpath(file.path, self.root)]
        watched = [file.path, *(folder for folder in folders if folder != self.root)]
        return Scan([c.name for c in categories], arrays, archives, watched, dict(left_out))

    def _paths(self, images: Images, folders: list[Path], file: AnnotationFile) -> list[str]:
        """Find the files of images, relative to the root."""
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            found = list(pool.map(partial(_find, folders), images.names, chunksize=1024))
        missing = [name for name, folder in zip(images.names, found, strict=True) if folder is None]
        if missing:
            more = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
            where = ", ".join(map(str, folders))
            file.fail(
                f"image {shown(missing[0])}{more} cannot be found in {where}",
                "copy it there or take it out of the file",
            )
        return [os.path.relpath(f / name, self.root) for f, name in zip(found, images.names, strict=True) if f]


def _find(folders: list[Path], name: str) -> Path | None:
    return next((folder for folder in folders if os.path.isfile(os.path.join(folder, name))), None)


def find_coco_layout(root: Path, split: str) -> CocoLayout | None:
    """Find the annotations of ``split`` (train or val) in ``root``; None where there are none."""
    known = [pattern.format(split=split) for pattern in ANNOTATIONS]
    known += [f"{folder}/{BESIDE}" for folder in SPLIT_FOLDERS[split]]
    for path in (root / name for name in known):
        if path.is_file():
            return CocoLayout(root, split, path)
    return None


def check_same_classes(train: ObjectIndex, val: ObjectIndex) -> None:
    """Refuse splits whose classes differ.

    Raises:
        UserError: names the first that differs.
    """
    if train.classes == val.classes:
        return
    only = [*(set(train.classes) ^ set(val.classes))]
    which = f"only one has {shown(min(only))}" if only else "their ids are in another order"
    raise UserError(
        f"{val.annotation_file} has other categories than {train.annotation_file} ({which}); give both the same list"
    )
