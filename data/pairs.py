"""Images with label maps: for each image a file of the same size whose pixels are the numbers of classes."""

import io
import itertools
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data.decoding import BadImage, read_file
from data.files import find_images, type_of
from data.index import ImageIndex, Layout, Scan
from utils.errors import UserError

VALUES = 256
"""So many different numbers a pixel of a label map may be."""
SCAN_THREADS = 16
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""Those of Cityscapes' labels that count in its evaluation; its files have these numbers."""
VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
VOID = 255
CLASS_FILES = "classes.txt", "objectInfo150.txt"
"""Names of the classes, a line each; and ADE20K's own table."""

Pair = tuple[str, str]
"""An image and its label map, relative to the root."""


class LabelMaps(ImageIndex):
    """What an index knows of label maps: ``index[i]`` is the bytes of an image and of its label map.

    ``arrays`` holds ``values``, which numbers occur in each map ``(N, 32)`` as bits, and the ``table`` ``(256,)`` from
    a file's numbers to those of classes. ``labels`` are all 0: it is pixels that have classes here.
    """

    def occurring(self) -> np.ndarray:
        """Tell which numbers occur in the files of label maps, ``(256,)`` bool."""
        return np.unpackbits(np.bitwise_or.reduce(self.arrays["values"], axis=0)).astype(bool)

    def first_with(self, value: int) -> str:
        """Name the first label map in which a number occurs."""
        return self.name_of_labels(int(np.flatnonzero(np.unpackbits(self.arrays["values"], axis=1)[:, value])[0]))

    @abstractmethod
    def name_of_labels(self, i: int) -> str:
        """Say where the label map of image ``i`` is."""


class PairIndex(LabelMaps):
    """``arrays`` holds the ``names`` of both files of each pair, the image first, and the ``ends`` of these."""

    def __getitem__(self, i: int) -> tuple[bytes, bytes]:
        return self.read(i), read_file(self.path(2 * i + 1))

    def path(self, number: int) -> Path:
        """Give the path of a file: of image ``i`` it is number ``2 i``, of its label map ``2 i + 1``."""
        names, ends = self.arrays["names"], self.arrays["ends"]
        return self.root / os.fsdecode(names[ends[number - 1] if number else 0 : ends[number]].tobytes())

    def read(self, i: int) -> bytes:
        return read_file(self.path(2 * i))

    def read_ahead(self, part: int, parts: int) -> int:
        return sum(len(data) for i in range(part, len(self), parts) for data in self[i])

    def name(self, i: int) -> str:
        return str(self.path(2 * i))

    def name_of_labels(self, i: int) -> str:
        return str(self.path(2 * i + 1))


class PairLayout(Layout):
    """One split of a data set of pairs.

    Args:
        root: the folder of the data set.
        name: of layout and split.
        folders: whose change makes the index stale, besides those that are found below them.
        find: gives the pairs, further such folders, and the files that are left out.
        find_classes: gives the names of the classes.
        table: from numbers in a file to numbers of classes; others are void. None leaves them as they are.
    """

    index_class = PairIndex

    def __init__(
        self,
        root: Path,
        name: str,
        folders: list[Path],
        find: Callable[[], tuple[list[Pair], list[Path], Counter[str]]],
        find_classes: Callable[[], list[str]],
        table: dict[int, int] | None = None,
    ):
        self.root, self.name, self.archives, self.find, self.table = root, name, folders, find, table
        self.find_classes = find_classes

    def classes(self, cache_dir: str) -> list[str]:
        return self.find_classes()

    def scan(self) -> Scan:
        classes = self.find_classes()
        pairs, folders, left_out = self.find()
        if not pairs:
            raise UserError(
                f"{self.archives[0]} has no image whose label map has the same name in {self.archives[-1]}; "
                "see docs/segmentation.md"
            )
        pairs.sort()
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            values = list(pool.map(lambda pair: look(self.root / pair[0], self.root / pair[1]), pairs))
        names = [os.fsencode(name) for pair in pairs for name in pair]
        table = np.arange(VALUES, dtype=np.uint8)
        if self.table is not None:
            table[:] = VOID
            table[list(self.table)] = list(self.table.values())
        arrays: dict[str, np.ndarray] = {
            "labels": np.zeros(len(pairs), dtype=np.int32),
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            "values": np.packbits(np.stack(values), axis=1),
            "table": table,
        }
        archives = [os.path.relpath(folder, self.root) for folder in self.archives]
        named = [self.root / name for name in CLASS_FILES]
        maps = [self.root / labels for _, labels in pairs]  # what is in them is in the index
        return Scan(classes, arrays, archives, [*self.archives, *folders, *named, *maps], dict(left_out))


def look(image: Path, labels: Path) -> np.ndarray:
    """Tell which numbers occur in a label map, ``(256,)`` bool, and that it fits its image.

    Raises:
        UserError: it does not, or is no label map.
    """
    try:
        pixels = decode_labels(read_file(labels))
    except (BadImage, ValueError) as error:
        raise UserError(f"label map {labels}: {error}") from error
    try:
        with Image.open(image) as picture:
            size = picture.size[::-1]
    except Exception:  # whether an image can be decoded is seen when it is
        size = pixels.shape
    if size != pixels.shape:
        raise UserError(
            f"label map {labels} is {pixels.shape[0]} x {pixels.shape[1]}, its image {image} {size[0]} x {size[1]}; "
            "make them the same size (label maps with nearest interpolation)"
        )
    return values_in(pixels)


def values_in(labels: np.ndarray) -> np.ndarray:
    """Tell which numbers occur in a label map, ``(256,)`` bool."""
    return np.bincount(labels.ravel(), minlength=VALUES) > 0


def decode_labels(data: bytes) -> np.ndarray:
    """Decode a label map, ``(H, W)`` uint8; of a palette the numbers count, not the colours.

    Raises:
        BadImage: it is damaged, or its pixels are no numbers of classes.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode, kind = picture.mode, picture.format
            pixels = np.array(picture)
    except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
        raise BadImage(f"it cannot be decoded ({error})") from error
    if kind in ("JPEG", "WEBP", "AVIF"):
        raise BadImage(f"{kind} changes the numbers of classes; save label maps as PNG")
    if mode not in ("1", "L", "P", "I;16", "I"):
        raise BadImage(f"it has colours ({mode}), not a number for each pixel; save it as a grey PNG of class numbers")
    if mode not in ("1", "L", "P") and pixels.max(initial=0) >= VALUES:
        raise BadImage(f"it has the number {pixels.max()}; classes are numbered from 0 to at most 254, and 255 is void")
    return pixels.astype(np.uint8)


# ---- Layouts


SPLITS = {"train": ("train", "training"), "val": ("val", "validation")}
"""What the parts may be called on disk."""


def in_folders(root: Path, split: str) -> PairLayout | None:
    for folder in SPLITS[split]:
        for images, masks in itertools.product((root / "images", root), ("masks", "annotations", "labels")):
            images, labels = images / folder, root / masks / folder
            if images.is_dir() and labels.is_dir():
                return PairLayout(
                    root,
                    f"{split}-pairs",
                    [images, labels],
                    partial(same_names, root, images, labels),
                    lambda: read_classes(root),
                )
    return None


def as_cityscapes(root: Path, split: str) -> PairLayout | None:
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    if not (images.is_dir() and labels.is_dir()):
        return None

    def find() -> tuple[list[Pair], list[Path], Counter[str]]:
        return same_names(root, images, labels, "_leftImg8bit", "_gtFine_labelIds")

    numbers = {number: i for i, number in enumerate(CITYSCAPES)}
    return PairLayout(root, f"{split}-cityscapes", [images, labels], find, lambda: [*CITYSCAPES.values()], numbers)


def as_voc(root: Path, split: str) -> PairLayout | None:
    for base in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        images, labels, names = base / "JPEGImages", base / "SegmentationClass", base / "ImageSets" / "Segmentation"
        if not (images.is_dir() and labels.is_dir() and (names / f"{split}.txt").is_file()):
            continue

        def find(images=images, labels=labels, names=names) -> tuple[list[Pair], list[Path], Counter[str]]:
            stems = (names / f"{split}.txt").read_text().split()
            pairs = [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
            return [(str(a.relative_to(root)), str(b.relative_to(root))) for a, b in pairs], [], Counter()

        return PairLayout(root, f"{split}-voc", [images, labels, names / f"{split}.txt"], find, lambda: VOC)
    return None


def same_names(
    root: Path, images: Path, labels: Path, of_images: str = "", of_labels: str = ""
) -> tuple[list[Pair], list[Path], Counter[str]]:
    """Pair the images below a folder with the label maps of the same names below another, whatever their types.

    Args:
        of_images, of_labels: what the names end with besides, which differs.

    Returns:
        the pairs relative to ``root``, the folders that were looked into, and what is left out.

    Raises:
        UserError: as :func:`data.files.find_images`; or two files have one name.
    """
    there, maps = find_images(images), find_images(labels)
    found, left_out = _by_stem(images, there.images, of_images), there.left_out + maps.left_out
    mapped = _by_stem(labels, maps.images, of_labels)
    pairs = [(found[stem], mapped[stem]) for stem in found.keys() & mapped.keys()]
    for stem in found.keys() - mapped.keys():
        left_out[f"{type_of(found[stem].name)} without a label map"] += 1
    for stem in mapped.keys() - found.keys():
        left_out[f"{type_of(mapped[stem].name)} without an image"] += 1
    relative = [(str(a.relative_to(root)), str(b.relative_to(root))) for a, b in pairs]
    return relative, [*there.folders, *maps.folders], left_out


def _by_stem(folder: Path, names: Iterable[str], suffix: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in names:
        stem = str(PurePosixPath(name).with_suffix(""))
        if not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in found:
            raise UserError(f"{folder / name} and {found[stem]} have one name, so their label map is not clear")
        found[stem] = folder / name
    return found


def read_classes(root: Path) -> list[str]:
    """Read the names of the classes: a line each in ``classes.txt``, or ADE20K's ``objectInfo150.txt``.

    Raises:
        UserError: there is neither, or a name stands twice.
    """
    try:
        ours, of_ade20k = (root / name for name in CLASS_FILES)
        if of_ade20k.is_file() and not ours.is_file():
            lines = of_ade20k.read_text(encoding="utf-8").splitlines()[1:]
            return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
        lines = ours.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{root / 'classes.txt'} cannot be read: write the name of each class on a line of its own there, in the "
            "order of their numbers in the label maps"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{root / 'classes.txt'} has the class {name!r} twice; keep one")
    if not 0 < len(names) < VALUES:
        raise UserError(f"{root / 'classes.txt'} names {len(names)} classes; from 1 to {VALUES - 1} are possible")
    return names
