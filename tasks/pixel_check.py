"""What to know of label maps before training: pixels of each class, and what the augmentation makes of them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.augmentation import DeviceStage
from data.augmentation.pairs import VOID, build_pair_transform
from data.build import open_pairs
from data.coco import ObjectIndex
from data.dataset import ImageDataset, Sample
from data.decoding import build_decoding, decode, tensor_to_pil
from data.files import describe_left_out
from data.inspection import Checked, inspect, make_report
from data.pair_layouts import find_pair_layout
from data.pairs import LabelMaps, decode_labels
from data.sampling import epoch_order
from tasks.overlay import painted
from tasks.segmentation import DecodePair, label_table
from utils.contact_sheet import draw_rows
from utils.errors import UserError
from utils.image_size import height_and_width
from utils.processes import forked
from utils.progress import with_progress
from utils.tables import Table

CHUNK = 32
SHOWN, CELL = 6, 200
"""Images in the preview, and the pixels of the longest side of each."""


class ImagesAlone:
    """The images of pairs or with objects, all of one class, as the inspection of images takes them."""

    def __init__(self, index: LabelMaps | ObjectIndex):
        self.index, self.root, self.left_out = index, index.root, index.left_out
        self.labels, self.name = index.labels, index.name

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        return self.index.read(i), 0


def check_pairs(config, workers: int) -> Checked:
    """Check images with label maps in at most so many processes.

    Raises:
        UserError: something is missing or does not fit, or a process was killed.
    """
    indexes, classes = open_pair_splits(config)
    images = {name: ImagesAlone(index) for name, index in indexes.items()}
    splits = {name: inspect(index, build_decoding(config), workers, name) for name, index in images.items()}
    report = make_report(config, splits, ["image"])
    for name, index in indexes.items():
        report["splits"][name] |= describe_pixels(count_pixels(config, index, classes, workers, name), classes)
    sheet = preview(config, next(iter(indexes.values())), classes)
    return Checked(report, describe_left_out(indexes), sheet, [pixel_table(report, classes)])


def open_pair_splits(config) -> tuple[dict[str, LabelMaps], list[str]]:
    """Open those of train and val that are there, and name the classes.

    Raises:
        UserError: neither is, or a label map does not fit the settings.
    """
    root = Path(config.DATA.DATA_PATH)
    train = not root.is_dir() or find_pair_layout(root, "train") is not None
    indexes = dict(zip(("train", "val"), open_pairs(config, training=train)[:2], strict=True))
    there = {split: index for split, index in indexes.items() if index is not None}
    classes = next(iter(there.values())).classes
    for index in there.values():
        label_table(config, index, len(classes))
    return there, classes


def count_pixels(config, index: LabelMaps, classes: list[str], workers: int, split: str) -> np.ndarray:
    """Count the pixels of each class in each label map, ``(N, classes + 1)`` int64; the last column is void.

    Raises:
        UserError: a process was killed.
    """
    chunks = [range(start, min(start + CHUNK, len(index))) for start in range(0, len(index), CHUNK)]
    function = partial(count_chunk, index, label_table(config, index, len(classes)), len(classes))
    killed = f"a process was killed while it checked the label maps of {split}; use fewer --workers"
    with forked(function, min(workers, len(chunks)), killed) as submit:
        tasks = [submit(chunk) for chunk in chunks]
        title = f"{split} label maps"
        return np.concatenate(list(with_progress((task.result() for task in tasks), title, len(index), len)))


def count_chunk(index: LabelMaps, table: np.ndarray, classes: int, chunk: Iterable[int]) -> np.ndarray:
    """Count the pixels of some label maps; the index has decoded each of them once."""
    counts = [np.bincount(table[decode_labels(index[i][1])].ravel(), minlength=VOID + 1) for i in chunk]
    return np.stack([np.append(each[:classes], each[VOID]) for each in counts])


def describe_pixels(counts: np.ndarray, classes: list[str]) -> dict:
    """Sum up the counts of a split for the report."""
    total = counts.sum()
    per_class = {
        name: {"images": int((column > 0).sum()), "share": float(column.sum() / total)}
        for name, column in zip([*classes, "void"], counts.T, strict=True)
    }
    return {"pixels": per_class, "label_maps_all_void": int((counts[:, :-1].sum(axis=1) == 0).sum())}


def pixel_table(report: dict, classes: list[str]) -> Table:
    """Tabulate in how many images each class is, and its share of the pixels."""
    splits = report["splits"]
    rows = []
    for name in [*classes, "void"]:
        cells = [splits[split]["pixels"][name] for split in splits]
        rows.append([name, *(x for cell in cells for x in (f"{cell['images']:,}", f"{100 * cell['share']:.2f} %"))])
    return Table("classes", ["", *(x for split in splits for x in (f"{split} images", "pixels"))], rows)


def preview(config, index: LabelMaps, classes: list[str]) -> bytes:
    """Draw the first images of epoch 0: with their label maps, and as training sees them in two epochs, as a PNG."""
    table, decoding = label_table(config, index, len(classes)), build_decoding(config)
    chosen = epoch_order(config.SEED, 0, len(index))[:SHOWN].tolist()
    sample = DecodePair(table, decoding, build_pair_transform(config))
    dataset = ImageDataset(index, sample, config.SEED, replace_bad=True)
    rows: dict[str, list[Image.Image]] = {"as they are": []}
    for i in chosen:
        image, labels = index[i]
        picture = painted(tensor_to_pil(decode(image, decoding)), table[decode_labels(labels)], classes)
        rows["as they are"].append(picture)
    for epoch in (0, 1):
        samples = [dataset[epoch, i].sample for i in chosen]
        rows[f"as in training, epoch {epoch}"] = [picture_of(config, each, classes) for each in samples]
    height, width = height_and_width(config.DATA.IMG_SIZE)
    low, high = config.AUG.RESIZE_RATIO
    heading = (
        f"crops of {height} x {width} pixels from images within {config.AUG.RESIZE[0]} x {config.AUG.RESIZE[1]}, "
        f"times {low:g} to {high:g}"
    )
    return draw_rows(rows, [], heading, SHOWN, CELL)


def picture_of(config, sample: Sample | None, classes: list[str]) -> Image.Image:
    """Paint the label map of a training sample over its image, padding as the model sees it."""
    if sample is None or not isinstance(sample.target, torch.Tensor):
        raise UserError("no image of the training data can be decoded")
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.DATA.MEAN, config.DATA.STD))
    seen = DeviceStage(torch.device("cpu"), config.DATA.MEAN, config.DATA.STD)(sample.image[None], [sample.plan])[0]
    pixels = (255 * (seen * std + mean)).round().clamp(0, 255).byte()
    return painted(tensor_to_pil(pixels), sample.target.numpy(), classes)
