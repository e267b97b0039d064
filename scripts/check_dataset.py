"""Check a data set before training on it: ``python scripts/check_dataset.py --data-path DIR``.

Decodes every image as the trainer does, names the bad and odd ones, duplicates and leaks from train to val, and draws
what the augmentation makes of some. Exit status 0: sound; 1: an image cannot be decoded, or leaks; 2: see the error.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import build_config
from data.augmentation import (
    augments_on_device,
    build_eval_transform,
    build_mixing,
    build_train_stage,
    build_train_transform,
)
from data.augmentation.transforms import TrainTransform
from data.build import open_images
from data.dataset import DecodeAndTransform, ImageDataset
from data.decoding import Decoding, build_decoding, decode, decode_with_orientation, is_deep_grey, open_picture
from data.files import describe_left_out
from data.index import Index, open_index
from data.layouts import find_layout
from data.loading import TrainLoader
from data.sampling import epoch_order
from utils.errors import Parser, UserError, say_error
from utils.image_size import height_and_width
from utils.names import drawable, font_file, printable
from utils.processes import CTRL_C_STATUS
from utils.randomness import seed_everything
from utils.surroundings import a_path, settle

CHUNK = 32
SECONDS_BETWEEN_LINES = 30
NAMES_SHOWN = 10
COLOUR_SAMPLE = 4096
COLOUR_PIXELS = 1_000_000
TINY_SIDE = 32
HUGE_PIXELS = 40_000_000
COLUMNS, CELL, GAP, LINE = 8, 128, 4, 20

KINDS = {
    "unreadable": "the file or its archive cannot be read; training would stop here",
    "empty": "the file has no bytes",
    "truncated": "the file was cut short",
    "broken": "cannot be decoded",
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
FAULTS = ("unreadable", "empty", "truncated", "broken")
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
    ]
)
"""All that is kept of an image."""


class Part(NamedTuple):
    """What a process has found out about some images.

    ``reasons`` says why an image cannot be decoded; ``colours`` holds mean and variance of the channels of those that
    belong to the sample, ``(N, 2, 3)``, where white is 1.
    """

    records: np.ndarray
    reasons: dict[int, str]
    colours: np.ndarray


@dataclass
class Checked:
    """A split, and the same of all its images."""

    images: Index
    records: np.ndarray
    reasons: dict[int, str]
    colours: np.ndarray

    def having(self, kind: str) -> np.ndarray:
        """The images of a kind."""
        return np.flatnonzero(self.records["kinds"] & BIT[kind])

    def decoded(self) -> np.ndarray:
        """The images that can be decoded."""
        return np.flatnonzero(self.records["width"])

    def labels(self) -> np.ndarray:
        """The class of each image; a data set of timm's tells those of readable images only, else -1."""
        return getattr(self.images, "labels", self.records["label"])

    def detail(self, kind: str, i: int) -> str:
        """What else there is to say of an image of a kind."""
        record = self.records[i]
        if kind in FAULTS:
            return self.reasons[i]
        if kind in ("tiny", "huge"):
            return f"{record['width']} x {record['height']}"
        if kind == "other_format":
            return record["format"].decode()
        return f"orientation {record['orientation']}" if kind == "rotated" else ""


# ---- Looking at images, in many processes


def check_split(images: Index, decoding: Decoding, workers: int, title: str, console: Console) -> Checked:
    """Decode all images.

    Raises:
        UserError: a process was killed.
    """
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    stride = -(-len(images) // COLOUR_SAMPLE)
    began = time.perf_counter()
    # Forked processes share the index
    pool = ProcessPoolExecutor(min(workers, len(chunks)), get_context("fork"), start_worker, (images, decoding, stride))
    try:
        parts = list(with_progress(pool.map(check_chunk, chunks), title, len(images), began, console))
    except BrokenProcessPool as error:
        raise UserError(
            f"a process was killed while it checked {title}, perhaps for want of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return Checked(
        images,
        np.concatenate([part.records for part in parts]),
        {i: reason for part in parts for i, reason in part.reasons.items()},
        np.concatenate([part.colours for part in parts]),
    )


def start_worker(images: Index, decoding: Decoding, stride: int) -> None:
    global _images, _decoding, _stride
    _images, _decoding, _stride = images, decoding, stride
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a live bar's stand-ins hold a lock that was copied locked
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and without a word
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Pillow's, about odd metadata


def check_chunk(chunk: range) -> Part:
    """Look at some of the images that the process was started with."""
    records, reasons, colours = np.zeros(len(chunk), RECORD), {}, []
    for i, record in zip(chunk, records, strict=True):
        pixels, fault, reason = examine(_images, i, record, _decoding)
        if pixels is None:
            record["kinds"] |= BIT[fault]
            reasons[i] = reason
        elif i % _stride == 0:
            colours.append(mean_and_variance(pixels))
    return Part(records, reasons, np.array(colours).reshape(-1, 2, 3))


def examine(images: Index, i: int, record: np.void, decoding: Decoding) -> tuple[Tensor | None, str, str]:
    """Fill in the record of image ``i``; returns its pixels, or the kind of fault that it has and the reason."""
    try:
        record["label"] = -1
        data, record["label"] = images[i]
    except UserError as error:
        return None, "unreadable", str(error)
    except Exception as error:  # an archive's compressed bytes, or whatever a library of timm's makes of them
        if getattr(error, "errno", None):
            return None, "unreadable", error.strerror
        return None, "broken", one_line(error)
    if isinstance(data, bytes):
        record["bytes"] = len(data)
    try:
        record["hash"] = fingerprint(data, decoding)
        pixels, record["orientation"] = decode_with_orientation(data, decoding)
    except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
        reason = one_line(error)
        return None, "empty" if data == b"" else "truncated" if "truncated" in reason.lower() else "broken", reason
    record["height"], record["width"] = pixels.shape[1:]
    # A JPEG that only the fast decoder takes is just not odd
    with suppress(Exception), open_picture(data, decoding.max_pixels) as picture:
        record["format"] = (picture.format or "").encode()
        record["kinds"] |= sum(BIT[kind] for kind in oddities(picture, images.name(i)))
    if record["orientation"] > 1:
        record["kinds"] |= BIT["rotated"]
    if min(pixels.shape[1:]) < TINY_SIDE:
        record["kinds"] |= BIT["tiny"]
    if pixels[0].numel() > HUGE_PIXELS:
        record["kinds"] |= BIT["huge"]
    return pixels, "", ""


def fingerprint(data: bytes | Image.Image, decoding: Decoding) -> int:
    """64 bits of a hash, and 0 of nothing."""
    content = data
    if isinstance(data, Image.Image):
        with open_picture(data, decoding.max_pixels) as picture:  # refuses what is not to be opened
            content = picture.tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) if content else 0


def oddities(picture: Image.Image, name: str) -> Iterator[str]:
    """The kinds that an image's header tells of."""
    mode = picture.mode
    said = Image.registered_extensions().get(Path(name).suffix.lower())
    found = {"MPO": "JPEG"}.get(picture.format, picture.format)  # a JPEG with a preview behind it
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
    """Of each channel of an image ``(3, H, W)``: ``(2, 3)``, where white is 1. A large one is thinned out."""
    step = 1 + math.isqrt(pixels[0].numel() // COLOUR_PIXELS)
    pixels = pixels[:, ::step, ::step]
    variance, mean = torch.var_mean(pixels.flatten(1).float() / 255, dim=1, correction=0)
    return torch.stack([mean, variance]).numpy()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def with_progress(parts: Iterable[Part], title: str, total: int, began: float, console: Console) -> Iterator[Part]:
    """The parts as they come, with a live bar on a terminal and a plain line now and then in a file."""
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}")
    said, done = -math.inf, 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, facts="")
        for part in parts:
            done += len(part.records)
            now = time.perf_counter()
            rate = done / (now - began)
            left = timedelta(seconds=round((total - done) / rate))
            facts = f"{done:,}/{total:,} images  {rate:,.0f} images/s  {left} left"
            bar.update(task, completed=done, facts=facts)
            if not console.is_terminal and (done == total or now - said > SECONDS_BETWEEN_LINES):
                said = now
                say(console, f"{title}  {facts}")
            yield part


# ---- What all of it amounts to


def make_report(config, splits: dict[str, Checked], classes: list[str]) -> dict:
    """All that was found, as JSON takes it."""
    leaks = find_leaks(splits, classes)
    faulty = any(len(split.having(kind)) for split in splits.values() for kind in FAULTS)
    return {
        "data_path": config.DATA.DATA_PATH,
        "sound": not faulty and not leaks,
        "missing_splits": [name for name in ("train", "val") if name not in splits],
        "classes": len(classes),
        "splits": {name: describe_split(split, classes) for name, split in splits.items()},
        "leaks": leaks,
        "data_mean": list(config.DATA.MEAN),
        "data_std": list(config.DATA.STD),
    }


def describe_split(split: Checked, classes: list[str]) -> dict:
    formats, counts = np.unique(split.records["format"][split.decoded()], return_counts=True)
    return {
        "images": len(split.records),
        "left_out": dict(split.images.left_out),
        "decoded": len(split.decoded()),
        "formats": {name.decode() or "unknown": int(n) for name, n in zip(formats, counts, strict=True)},
        **count_classes(split, classes),
        "sizes": measure_sizes(split),
        "colours": measure_colours(split.colours),
        "findings": {kind: list_findings(split, kind) for kind in KINDS},
        "duplicates": find_duplicates(split, classes),
    }


def count_classes(split: Checked, classes: list[str]) -> dict:
    labels = split.labels()
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
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


def measure_sizes(split: Checked) -> dict | None:
    """Of the images that can be decoded."""
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
    """Of a sample, in which each image weighs the same, as it does in training."""
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


def list_findings(split: Checked, kind: str) -> list[dict[str, str]]:
    def entry(i: int) -> dict[str, str]:
        detail = split.detail(kind, i)
        return {"image": split.images.name(i), **({"detail": detail} if detail else {})}

    return [entry(i) for i in split.having(kind).tolist()]


def find_duplicates(split: Checked, classes: list[str]) -> list[dict]:
    """The images of a split that have the same bytes, and their classes."""
    groups = equal_groups(split.records["hash"])
    return [
        {"images": [split.images.name(i) for i in group], "classes": class_names(split, group, classes)}
        for group in groups
    ]


def find_leaks(splits: dict[str, Checked], classes: list[str]) -> list[dict]:
    """The images that are both in train and in val, and their classes."""
    if len(splits) < 2:
        return []
    train, val = splits["train"], splits["val"]
    leaks = []
    for group in equal_groups(np.concatenate([train.records["hash"], val.records["hash"]])):
        in_train = [i for i in group if i < len(train.records)]
        in_val = [i - len(train.records) for i in group if i >= len(train.records)]
        if in_train and in_val:
            names = {*class_names(train, in_train, classes), *class_names(val, in_val, classes)}
            leaks.append(
                {
                    "train": [train.images.name(i) for i in in_train],
                    "val": [val.images.name(i) for i in in_val],
                    "classes": sorted(names),
                }
            )
    return leaks


def equal_groups(hashes: np.ndarray) -> list[list[int]]:
    """The positions of each hash that occurs more than once; 0 is none."""
    order = np.argsort(hashes, kind="stable")
    same = np.diff(hashes[order]) == 0
    order = order[(np.append(same, False) | np.insert(same, 0, False)) & (hashes[order] != 0)]
    groups = np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1) if len(order) else []
    return sorted(group.tolist() for group in groups)


def class_names(split: Checked, images: list[int], classes: list[str]) -> list[str]:
    return sorted({classes[label] for label in split.labels()[images]})


# ---- What the augmentation makes of the images


@dataclass
class Augmentation:
    """The training pipeline of a config; ``mixings`` are mixup and cutmix, with a title for each."""

    device: torch.device
    transform: TrainTransform
    mixings: dict[str, Callable]


def build_augmentation(config, num_classes: int) -> Augmentation:
    """The augmentation of training.

    Raises:
        UserError: a setting does not fit, so that training would not start.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    transform = build_train_transform(config, augments_on_device(config, device))
    aug = config.AUG
    cutmix = bool(aug.CUTMIX or aug.CUTMIX_MINMAX)
    share = {"mixup": float(bool(aug.MIXUP)), "cutmix": float(cutmix)}
    if aug.MIXUP and cutmix:
        share = {"mixup": 1 - aug.MIXUP_SWITCH_PROB, "cutmix": aug.MIXUP_SWITCH_PROB}
    drawn_for = "batches" if aug.MIXUP_MODE == "batch" else "images"
    mixings = {
        f"{name} of epoch 0 with the next image ({100 * of_all * aug.MIXUP_PROB:.0f} % of the {drawn_for})": only(
            name, config, num_classes
        )
        for name, of_all in share.items()
        if of_all * aug.MIXUP_PROB
    }
    return Augmentation(device, transform, mixings)


def only(name: str, config, num_classes: int) -> Callable:
    """Mixup or cutmix alone, on every batch."""
    config = config.clone()
    config.defrost()
    config.AUG.MIXUP_PROB = 1.0
    if name == "mixup":
        config.AUG.CUTMIX, config.AUG.CUTMIX_MINMAX = 0.0, []
    else:
        config.AUG.MIXUP = 0.0
    return build_mixing(config, num_classes)


def draw_augmentations(config, split: Checked, classes: list[str], augmentation: Augmentation, path: Path) -> bool:
    """A contact sheet of the first images of epoch 0; False when there are not even two that can be decoded."""
    decodable = np.zeros(len(split.records), bool)
    decodable[split.decoded()] = True
    chosen = [i for i in epoch_order(config.SEED, 0, len(decodable)).tolist() if decodable[i]][:COLUMNS]
    if len(chosen) < 2:
        return False
    evaluation, decoding = build_eval_transform(config), build_decoding(config)
    rows = {"as in evaluation": [evaluation(decode(split.images[i][0], decoding))[0] for i in chosen]}
    epochs = [[(epoch, i) for i in chosen] for epoch in (0, 1)]
    sample = DecodeAndTransform(augmentation.transform, decoding)
    dataset = ImageDataset(split.images, sample, config.SEED, False)
    stage = build_train_stage(config, augmentation.device)
    loader = TrainLoader(dataset, epochs, 0, augmentation.transform.size, stage)
    batches = list(loader)
    for epoch, batch in enumerate(batches):
        rows[f"as in training, epoch {epoch}"] = to_uint8(batch.images, config)
    for title, mixing in augmentation.mixings.items():
        rows[title] = to_uint8(mix_neighbours(config, augmentation.device, mixing, *batches[0][:2]), config)
    names = [classes[label] for label in split.labels()[chosen]]
    draw_sheet(rows, names, describe_augmentation(config), path)
    return True


def mix_neighbours(config, device: torch.device, mixing: Callable, images: Tensor, targets: Tensor) -> Tensor:
    """Each image mixed with the next as in a step of its own, since one draw may hold for a whole batch."""
    mixed = []
    for step in range(len(images)):
        pair = [step, (step + 1) % len(images)]
        seed_everything(device, config.SEED, "step", step, 0, 0)
        mixed.append(mixing(images[pair], targets[pair])[0][0])
    return torch.stack(mixed)


def describe_augmentation(config) -> str:
    aug, (height, width) = config.AUG, height_and_width(config.DATA.IMG_SIZE)
    policy = aug.AUTO_AUGMENT if aug.AUTO_AUGMENT != "none" else f"colour jitter {aug.COLOR_JITTER:g}"
    return (
        f"{height} x {width} pixels, crop of {100 * aug.SCALE[0]:g} to {100 * aug.SCALE[1]:g} % of the area, {policy}, "
        f"random erasing {aug.REPROB:g} ({aug.REMODE})"
    )


def to_uint8(images: Tensor, config) -> Tensor:
    """Normalised images as they were before, ``(B, 3, H, W)``."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.DATA.MEAN, config.DATA.STD))
    return (255 * (images.cpu() * std + mean)).round().clamp(0, 255).to(torch.uint8)


def draw_sheet(rows: dict[str, Iterable[Tensor]], names: list[str], heading: str, path: Path) -> None:
    """Rows of images with their titles, below a heading and the names of the columns."""
    step = CELL + GAP
    sheet = Image.new("RGB", (COLUMNS * step + GAP, 2 * LINE + len(rows) * (LINE + step)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, width: int, size: int, colour: str) -> None:
        font, text = ImageFont.truetype(font_file(), size), drawable(text)
        while draw.textlength(text, font) > width:
            text = text.removesuffix("...")[:-1] + "..."
        draw.text((x, y + LINE / 2), text, colour, font, anchor="lm")

    write(GAP, 0, heading, sheet.width - 2 * GAP, 14, "black")
    for column, name in enumerate(names):
        write(GAP + column * step, LINE, name, CELL, 12, "grey")
    for row, (title, images) in enumerate(rows.items()):
        top = 2 * LINE + row * (LINE + step)
        write(GAP, top, title, sheet.width - 2 * GAP, 14, "black")
        for column, image in enumerate(images):
            larger = max(image.shape[-2:])
            scaling = Image.Resampling.LANCZOS if larger > CELL else Image.Resampling.NEAREST
            shown = [max(1, round(side * CELL / larger)) for side in image.shape[:-3:-1]]
            sheet.paste(to_pil_image(image).resize(shown, scaling), (GAP + column * step, top + LINE))
    with writing_to(path.parent):
        sheet.save(path, optimize=True)


# ---- What a person reads


def say(console: Console, text: str, style: str = "") -> None:
    body = text.lstrip("\n")
    text = text[: len(text) - len(body)] + printable(body)  # a name may hold anything
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_report(console: Console, report: dict, file: Path) -> None:
    """A summary; the rest is in ``file``."""
    say(console, f"\n{report['data_path']}", "bold")
    for name in report["missing_splits"]:
        say(console, f"there is no {name}: nothing is known of it", "yellow")
    console.print(class_table(report), "", size_table(report), sep="\n")
    for name, split in report["splits"].items():
        print_colours(console, name, split["colours"], report)
    for name, split in report["splits"].items():
        if split["classes_missing"]:
            heading = f"classes without an image in {name} ({len(split['classes_missing']):,})"
            print_list(console, heading, split["classes_missing"], file, "yellow")
    for kind, meaning in KINDS.items():
        findings = [entry for split in report["splits"].values() for entry in split["findings"][kind]]
        lines = [f"{entry['image']}: {entry['detail']}" if "detail" in entry else entry["image"] for entry in findings]
        heading = f"{kind.replace('_', ' ')} ({len(findings):,}): {meaning}"
        print_list(console, heading, lines, file, "red" if kind in FAULTS else "yellow")
    for name, split in report["splits"].items():
        lines = [f"{' = '.join(group['images'])}{differing(group)}" for group in split["duplicates"]]
        print_list(console, f"more than once in {name} ({len(lines):,})", lines, file, "yellow")
    lines = [f"{' = '.join(group['val'] + group['train'])}{differing(group)}" for group in report["leaks"]]
    print_list(console, f"in val and in train too ({len(lines):,})", lines, file, "red")


def class_table(report: dict) -> Table:
    table = Table("", "images", "decoded", "classes", "smallest class", "median", "largest class", box=None)
    for name, split in report["splits"].items():
        counts = split["images_per_class"]
        per_class = [f"{counts[key]['images']:,}" for key in ("smallest", "largest")] if counts else ["-", "-"]
        per_class.insert(1, f"{counts['median']:,.10g}" if counts else "-")
        classes = f"{report['classes'] - len(split['classes_missing']):,}"
        table.add_row(name, f"{split['images']:,}", f"{split['decoded']:,}", classes, *per_class)
    return right_aligned(table)


def size_table(report: dict) -> Table:
    table = Table("", "min", "median", "mean", "max", box=None)
    for name, split in report["splits"].items():
        for what, values in (split["sizes"] or {}).items():
            table.add_row(f"{name} {what}", *(f"{value:,.0f}" for value in values.values()))
    return right_aligned(table)


def right_aligned(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def print_colours(console: Console, name: str, colours: dict | None, report: dict) -> None:
    if not colours:
        return

    def triple(values: list[float]) -> str:
        return "  ".join(f"{value:.3f}" for value in values)

    say(console, f"\nred, green and blue in {name}, from {colours['sampled_images']:,} images of equal weight")
    say(console, f"    mean                    {triple(colours['mean'])}    DATA.MEAN  {triple(report['data_mean'])}")
    within = triple(colours["std_within_images"])
    say(console, f"    deviation in an image   {within}    DATA.STD   {triple(report['data_std'])}")
    say(console, f"    deviation of all pixels {triple(colours['std_of_all_pixels'])}")


def print_list(console: Console, heading: str, lines: list[str], file: Path, style: str) -> None:
    if not lines:
        return
    say(console, f"\n{heading}", style)
    for line in lines[:NAMES_SHOWN]:
        say(console, f"    {line}")
    if len(lines) > NAMES_SHOWN:
        say(console, f"    and {len(lines) - NAMES_SHOWN:,} more, see {file}")


def differing(group: dict) -> str:
    return f" (in different classes: {', '.join(group['classes'])})" if len(group["classes"]) > 1 else ""


# ---- The command


def parse(arguments: list[str]) -> argparse.Namespace:
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


def open_splits(config) -> tuple[dict[str, Index], list[str]]:
    """Those of train and val that are there, and the names of the classes."""
    root, layout = Path(config.DATA.DATA_PATH), config.DATA.FORMAT
    there = ["train", "val"]
    if config.DATA.DATA_PATH and root.is_dir() and "/" not in layout:
        there = [split for split in there if find_layout(root, split, layout)]
    if there == ["train"]:
        train = open_index(find_layout(root, "train", layout), config.DATA.CACHE_DIR)
        return {"train": train}, train.classes
    train, val, classes = open_images(config, training=there != ["val"])
    return {"val": val} if train is None else {"train": train, "val": val}, classes


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Name the folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --output") from error


def check(arguments: list[str]) -> int:
    given = parse(arguments)
    flags = [("DATA.DATA_PATH", given.data_path, "--data-path")] if given.data_path is not None else []
    config = build_config(given.cfg, given.opts, flags)
    images, classes = open_splits(config)
    augmentation = build_augmentation(config, len(classes))
    console, file, sheet = Console(), given.output / "report.json", given.output / "augmentations.png"
    with writing_to(given.output):
        given.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=given.output).close()  # after an hour of checking it would be late to find out
    decoding = build_decoding(config)
    splits = {name: check_split(split, decoding, given.workers, name, console) for name, split in images.items()}
    report = make_report(config, splits, classes)
    with writing_to(given.output):
        file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    drawn = draw_augmentations(config, next(iter(splits.values())), classes, augmentation, sheet)
    print_report(console, report, file)
    say(console, f"\neverything in {file}" + (f", what training makes of the images in {sheet}" if drawn else ""))
    left_out = describe_left_out(images)
    verdict = "the data set is sound" if report["sound"] else "the data set is NOT sound: mend what is listed in red"
    verdict += f"; {left_out}" * bool(left_out)
    say(console, verdict, "green" if report["sound"] else "red")
    return 0 if report["sound"] else 1


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    settle()
    try:
        return check(arguments)
    except UserError as error:
        say_error(error)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        return CTRL_C_STATUS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
