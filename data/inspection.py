"""What is wrong or odd with the images of a data set: every one is decoded as the trainer does."""

import hashlib
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.dataset import read_item
from data.decoding import BadImage, Decoding, decode_with_orientation, is_deep_grey, open_picture
from data.index import Index, Layout, open_index
from data.layouts import find_layout
from data.near_duplicates import look_of, pairs_alike
from data.splits import open_images
from utils.errors import UserError
from utils.processes import forked
from utils.progress import with_progress
from utils.tables import Table

CHUNK = 32
COLOUR_SAMPLE = 4096
COLOUR_PIXELS = 1_000_000
TINY_SIDE = 32
HUGE_PIXELS = 40_000_000

KINDS = {
    "unreadable": "the file or its archive cannot be read; training would stop here",
    "empty": "the file has no bytes",
    "truncated": "the file was cut short",
    "broken": "cannot be decoded",
    "other_size": "not of the size that its annotations say",
    "other_format": "not what the extension says; harmless, since the bytes decide",
    "cmyk": "CMYK; Pillow converts it to RGB",
    "grey": "one channel, which is used as red, green and blue",
    "more_than_8_bits": "more than 8 bits a channel, scaled to 8 (docs/data.md)",
    "palette": "colours from a palette; converted to RGB",
    "alpha": "the transparency is dropped, and what lies below it shows",
    "rotated": "EXIF says that it is to be turned or mirrored, which DATA.UPRIGHT True does",
    "tiny": f"the short side has fewer than {TINY_SIDE} pixels",
    "huge": f"more than {HUGE_PIXELS / 1e6:.0f} megapixels, slow to decode",
}
FAULTS = ("unreadable", "empty", "truncated", "broken", "other_size")
BIT = {kind: 1 << number for number, kind in enumerate(KINDS)}

SIXTEEN_BITS = re.compile(";16[BLN]")
"""In Pillow's plan of how to decode an image: 16 bits a channel and their byte order."""

RECORD = np.dtype(
    [
        ("hash", "u8"),  # of the bytes; 0 where there are none
        ("bytes", "i8"),  # 0 where there is no file of its own
        ("width", "i4"),
        ("height", "i4"),
        ("label", "i4"),
        ("kinds", "u2"),
        ("orientation", "u1"),
        ("format", "S8"),
        ("look", "u1", 32),  # see near_duplicates.py
    ]
)
"""All that is kept of an image."""


@dataclass
class Inspection:
    """What is known of the images of a split.

    Attributes:
        records: one of each.
        reasons: what is wrong with those that have a fault, by number.
        colours: mean and variance of the channels of those that belong to the sample, ``(N, 2, 3)``; white is 1.
    """

    index: Index
    records: np.ndarray
    reasons: dict[int, str]
    colours: np.ndarray

    def having(self, kind: str) -> np.ndarray:
        """Find the images of a kind, by number."""
        return np.flatnonzero(self.records["kinds"] & BIT[kind])

    def decoded(self) -> np.ndarray:
        """Find the images that can be decoded, by number."""
        return np.flatnonzero(self.records["width"])

    def labels(self) -> np.ndarray:
        """List the class of each image; a data set of timm's tells those of readable images only, else -1."""
        return getattr(self.index, "labels", self.records["label"])

    def detail(self, kind: str, i: int) -> str:
        """Say what else there is to know of an image of a kind."""
        record = self.records[i]
        if kind in FAULTS:
            return self.reasons[i]
        if kind in ("tiny", "huge"):
            return f"{record['width']} x {record['height']}"
        if kind == "other_format":
            return record["format"].decode()
        return f"orientation {record['orientation']}" if kind == "rotated" else ""


class Checked(NamedTuple):
    """All that is known of a data set once it is checked.

    Attributes:
        report: as of :func:`make_report`.
        left_out: a line about what is not used; empty where all is.
        sheet: pictures of what training makes of some images, as a PNG; None where no image can be decoded.
        tables: what else there is to show.
    """

    report: dict
    left_out: str
    sheet: bytes | None
    tables: list[Table]


def open_splits(config) -> tuple[dict[str, Index], list[str]]:
    """Open those of train and val that are there; returns the names of the classes too."""
    root, layout = Path(config.DATA.DATA_PATH), config.DATA.FORMAT
    there = ["train", "val"]
    plain = not (config.DATA.VAL_SHARE or config.DATA.LABELS or config.DATA.MORE_PATHS)
    if config.DATA.DATA_PATH and root.is_dir() and "/" not in layout and plain:
        there = [split for split in there if find_layout(root, split, layout)]
    if there == ["train"]:
        only = open_index(cast(Layout, find_layout(root, "train", layout)), config.DATA.CACHE_DIR)
        return {"train": only}, only.classes
    train, val, classes = open_images(config, training=there != ["val"])
    return {"val": val} if train is None else {"train": train, "val": val}, classes


# ---- Looking at images, in many processes


def inspect(index: Index, decoding: Decoding, workers: int, split: str) -> Inspection:
    """Decode all images of a split, in at most so many processes.

    Raises:
        UserError: a process was killed.
    """
    chunks = [range(start, min(start + CHUNK, len(index))) for start in range(0, len(index), CHUNK)]
    function = partial(inspect_chunk, index, decoding, -(-len(index) // COLOUR_SAMPLE))
    killed = f"a process was killed while it checked {split}, perhaps for want of memory; use fewer --workers"
    with forked(function, min(workers, len(chunks)), killed) as submit:
        tasks = [submit(chunk) for chunk in chunks]
        parts = with_progress((task.result() for task in tasks), split, len(index), lambda part: len(part[0]))
        records, of_chunks, colours = zip(*parts, strict=True)
    reasons = {i: reason for some in of_chunks for i, reason in some.items()}
    return Inspection(index, np.concatenate(records), reasons, np.concatenate(colours))


def inspect_chunk(
    index: Index, decoding: Decoding, stride: int, chunk: range
) -> tuple[np.ndarray, dict[int, str], np.ndarray]:
    """Look at some images; every ``stride``-th of all belongs to the sample whose colours are measured.

    Returns:
        records, reasons and colours; see :class:`Inspection`.
    """
    records, reasons, colours = np.zeros(len(chunk), RECORD), {}, []
    with warnings.catch_warnings(action="ignore"):  # of Pillow's, about odd metadata
        for i, record in zip(chunk, records, strict=True):
            pixels, fault, reason = examine(index, i, record, decoding)
            if pixels is None:
                record["kinds"] |= BIT[fault]
                reasons[i] = reason
            elif i % stride == 0:
                colours.append(mean_and_variance(pixels))
    return records, reasons, np.array(colours).reshape(-1, 2, 3)


def examine(index: Index, i: int, record: np.void, decoding: Decoding) -> tuple[Tensor | None, str, str]:
    """Fill in the record of image ``i``; returns its pixels, or the kind of fault that it has and the reason."""
    try:
        record["label"] = -1
        data, record["label"] = read_item(index, i)
    except (UserError, OSError) as error:
        return None, "unreadable", getattr(error, "strerror", None) or str(error)
    except BadImage as error:
        return None, "broken", one_line(error)
    if isinstance(data, bytes):
        record["bytes"] = len(data)
    try:
        record["hash"] = hash_of(data, decoding)
        pixels, record["orientation"] = decode_with_orientation(data, decoding)
    except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
        reason = one_line(error)
        return None, "empty" if data == b"" else "truncated" if "truncated" in reason.lower() else "broken", reason
    record["height"], record["width"] = pixels.shape[1:]
    record["look"] = look_of(pixels)
    # A JPEG that only the fast decoder takes is just not odd
    with suppress(Exception), open_picture(data, decoding.max_pixels) as picture:
        record["format"] = (picture.format or "").encode()
        record["kinds"] |= sum(BIT[kind] for kind in oddities(picture, index.name(i)))
    if record["orientation"] > 1:
        record["kinds"] |= BIT["rotated"]
    if min(pixels.shape[1:]) < TINY_SIDE:
        record["kinds"] |= BIT["tiny"]
    if pixels[0].numel() > HUGE_PIXELS:
        record["kinds"] |= BIT["huge"]
    return pixels, "", ""


def hash_of(data: bytes | Image.Image, decoding: Decoding) -> int:
    """Hash an image's bytes (or pixels, where it comes decoded) to 64 bits; 0 of nothing."""
    if isinstance(data, Image.Image):
        with open_picture(data, decoding.max_pixels) as picture:  # refuses what is not to be opened
            data = picture.tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8]) if data else 0


def oddities(picture: Image.Image, name: str) -> Iterator[str]:
    """Yield the kinds that an image's header tells of."""
    mode = picture.mode
    said = Image.registered_extensions().get(Path(name).suffix.lower())
    found = "JPEG" if picture.format == "MPO" else picture.format  # a JPEG with a preview behind it
    if said and found and said != found:
        yield "other_format"
    if mode == "CMYK":
        yield "cmyk"
    if mode in ("1", "L", "LA", "La") or is_deep_grey(mode):
        yield "grey"
    if is_deep_grey(mode) or SIXTEEN_BITS.search(str(getattr(picture, "tile", ())[:1])):
        yield "more_than_8_bits"
    if mode in ("P", "PA"):
        yield "palette"
    if picture.has_transparency_data:
        yield "alpha"


def mean_and_variance(pixels: Tensor) -> np.ndarray:
    """Measure each channel of an image ``(3, H, W)``: ``(2, 3)``, where white is 1. A large one is thinned out."""
    step = 1 + math.isqrt(pixels[0].numel() // COLOUR_PIXELS)
    pixels = pixels[:, ::step, ::step]
    variance, mean = torch.var_mean(pixels.flatten(1).float() / 255, dim=1, correction=0)
    return torch.stack([mean, variance]).numpy()


def one_line(error: Exception) -> str:
    """Put what an error says into one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- What all of it amounts to


def make_report(config, splits: dict[str, Inspection], classes: list[str]) -> dict:
    """Gather all that was found, as JSON takes it."""
    leaks = find_leaks(splits, classes)
    faulty = any(len(split.having(kind)) for split in splits.values() for kind in FAULTS)
    return {
        "data_path": config.DATA.DATA_PATH,
        "sound": not faulty and not leaks,
        "missing_splits": [name for name in ("train", "val") if name not in splits],
        "classes": len(classes),
        "splits": {name: describe_split(split, classes) for name, split in splits.items()},
        "leaks": leaks,
        "alike": find_alike(splits),
        "data_mean": list(config.DATA.MEAN),
        "data_std": list(config.DATA.STD),
    }


def describe_split(split: Inspection, classes: list[str]) -> dict:
    """Make a split's part of the report."""
    formats, counts = np.unique(split.records["format"][split.decoded()], return_counts=True)
    return {
        "images": len(split.records),
        "left_out": dict(split.index.left_out),
        "decoded": len(split.decoded()),
        "formats": {name.decode() or "unknown": int(n) for name, n in zip(formats, counts, strict=True)},
        **count_classes(split, classes),
        "sizes": measure_sizes(split),
        "colours": measure_colours(split.colours),
        "findings": {kind: list_findings(split, kind) for kind in KINDS},
        "duplicates": find_duplicates(split, classes),
    }


def count_classes(split: Inspection, classes: list[str]) -> dict:
    """Count how many images the classes have, and list those that have none."""
    labels = split.labels()
    return describe_counts(np.bincount(labels[labels >= 0], minlength=len(classes)), classes)


def describe_counts(counts: np.ndarray, classes: list[str]) -> dict:
    """Sum up how many images the classes have ``(len(classes),)``, and list those that have none."""
    present = np.flatnonzero(counts)
    if not len(present):
        return {"images_per_class": None, "classes_missing": classes}
    smallest, largest = present[counts[present].argmin()], counts.argmax()
    return {
        "images_per_class": {
            "smallest": {"class": classes[smallest], "images": int(counts[smallest])},
            "median": float(np.median(counts[present])),
            "largest": {"class": classes[largest], "images": int(counts[largest])},
        },
        "classes_missing": [classes[i] for i in np.flatnonzero(counts[: len(classes)] == 0)],
    }


def measure_sizes(split: Inspection) -> dict | None:
    """Sum up pixels and bytes of the images that can be decoded; None where there is none."""
    records = split.records[split.decoded()]
    if not len(records):
        return None
    columns = {name: records[name].astype(np.int64) for name in ("width", "height")}
    columns["pixels"] = columns["width"] * columns["height"]
    if records["bytes"].any():
        columns["bytes"] = records["bytes"]
    return {
        name: {"min": int(x.min()), "median": float(np.median(x)), "mean": float(x.mean()), "max": int(x.max())}
        for name, x in columns.items()
    }


def measure_colours(colours: np.ndarray) -> dict | None:
    """Average over a sample, in which each image weighs the same, as it does in training; None of an empty one."""
    if not len(colours):
        return None
    means, variances = colours.astype(np.float64).transpose(1, 0, 2)
    mean = means.mean(0)
    return {
        "sampled_images": len(colours),
        "mean": mean.tolist(),
        "std_within_images": np.sqrt(variances).mean(0).tolist(),
        "std_of_all_pixels": np.sqrt((variances + means**2).mean(0) - mean**2).tolist(),
    }


def list_findings(split: Inspection, kind: str) -> list[dict[str, str]]:
    """List the images of a kind, with what else there is to know of them."""
    found = [(split.index.name(i), split.detail(kind, i)) for i in split.having(kind).tolist()]
    return [{"image": name, "detail": detail} if detail else {"image": name} for name, detail in found]


def find_duplicates(split: Inspection, classes: list[str]) -> list[dict]:
    """List the images of a split that have the same bytes, and their classes."""
    return [
        {"images": [split.index.name(i) for i in group], "classes": sorted(class_names(split, group, classes))}
        for group in equal_groups(split.records["hash"])
    ]


def find_leaks(splits: dict[str, Inspection], classes: list[str]) -> list[dict]:
    """List the images that are both in train and in val, and their classes."""
    if len(splits) < 2:
        return []
    train, val = splits["train"], splits["val"]
    leaks = []
    for group in equal_groups(np.concatenate([train.records["hash"], val.records["hash"]])):
        in_train = [i for i in group if i < len(train.records)]
        in_val = [i - len(train.records) for i in group[len(in_train) :]]
        if in_train and in_val:
            leaks.append(
                {
                    "train": [train.index.name(i) for i in in_train],
                    "val": [val.index.name(i) for i in in_val],
                    "classes": sorted(class_names(train, in_train, classes) | class_names(val, in_val, classes)),
                }
            )
    return leaks


def find_alike(splits: dict[str, Inspection]) -> list[dict[str, str]]:
    """List pairs of an image of train and one of val that look alike and do not have the same bytes."""
    if len(splits) < 2:
        return []
    train, val = splits["train"], splits["val"]
    return [
        {"train": train.index.name(i), "val": val.index.name(j)}
        for i, j in pairs_alike(train.records["look"], val.records["look"])
        if train.records["hash"][i] != val.records["hash"][j]
    ]


def equal_groups(hashes: np.ndarray) -> list[list[int]]:
    """Find the positions of each hash that occurs more than once, in order; 0 is none."""
    order = np.argsort(hashes, kind="stable")
    same = np.diff(hashes[order]) == 0
    order = order[(np.append(same, False) | np.insert(same, 0, False)) & (hashes[order] != 0)]
    groups = np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1) if len(order) else []
    return sorted(group.tolist() for group in groups)


def class_names(split: Inspection, images: list[int], classes: list[str]) -> set[str]:
    """Name the classes of some images."""
    return {classes[label] for label in split.labels()[images]}
