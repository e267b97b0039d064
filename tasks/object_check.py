"""What to know of objects before training: how many of each class and size, odd boxes and masks, and how they look."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from config import Config
from data.augmentation.objects import build_object_transform
from data.augmentation.pairs import brought_within
from data.build import check_num_classes, open_coco, wants_masks
from data.coco import ObjectIndex, Objects, find_coco_layout
from data.coco_json import AnnotationFile
from data.dataset import ImageDataset, Sample
from data.decoding import Decoding, build_decoding, decode, tensor_to_pil
from data.files import describe_left_out
from data.inspection import BIT, FAULTS, Checked, Inspection, describe_counts, inspect, make_report
from data.objects import DecodeObjects
from data.sampling import epoch_order
from tasks.object_overlay import draw_objects
from tasks.pixel_check import ImagesAlone
from utils.contact_sheet import draw_rows
from utils.tables import Table

SIZES = ("small", "medium", "large")
SMALL, MEDIUM = 32**2, 96**2
"""Areas in pixels from which on COCO calls an object medium and large."""
LEAST_SIDE = 4
"""Of a box, in pixels after resizing."""
ROUNDING = 0.5
"""A box that reaches no more pixels out of its image has been rounded."""
TOLERANCE = 0.1
"""Of a box's sides: by so much the box of its mask may differ."""
SHOWN, CELL = 5, 320
"""Images in the preview, and the pixels of the longest side of each."""


def check_objects(config: Config, workers: int) -> Checked:
    """Check images with objects in at most so many processes.

    Raises:
        UserError: something is missing or does not fit, or a process was killed.
    """
    indexes, classes = open_object_splits(config)
    splits = {}
    for name, index in indexes.items():
        splits[name] = inspect(ImagesAlone(index), build_decoding(config), workers, name)
        mark_other_sizes(splits[name], index.sizes)
    report = make_report(config, splits, ["image"]) | {"classes": len(classes)}
    for name, index in indexes.items():
        report["splits"][name] |= describe_objects(config, index, classes)
    first, index = next(iter(indexes.items()))
    sheet = preview(config, splits[first], index, classes)
    return Checked(report, describe_left_out(indexes), sheet, [object_table(report, classes)])


def open_object_splits(config: Config) -> tuple[dict[str, ObjectIndex], list[str]]:
    """Open those of train and val that are there, with images without objects too, and name the classes.

    Raises:
        UserError: neither is, or the classes do not fit the settings.
    """
    root = Path(config.DATA.DATA_PATH)
    there = [split for split in ("train", "val") if find_coco_layout(root, split)]
    indexes = open_coco(config, there or ["train", "val"])
    classes = next(iter(indexes.values())).classes
    check_num_classes(config, classes)
    return indexes, classes


def mark_other_sizes(split: Inspection, sizes: np.ndarray) -> None:
    """Mark the images that are not of the ``sizes`` ``(N, 2)``, height and width, that annotations say."""
    there = split.decoded()
    found = np.stack([split.records["height"], split.records["width"]], axis=1)
    for i in there[(found[there] != sizes[there]).any(axis=1)].tolist():
        (height, width), (told_height, told_width) = found[i], sizes[i]
        split.records["kinds"][i] |= BIT["other_size"]
        split.reasons[i] = f"it is {width} wide and {height} high, its annotations say {told_width} and {told_height}"


def describe_objects(config: Config, index: ObjectIndex, classes: list[str]) -> dict:
    """Sum up the objects of a split for the report, and list the odd ones."""
    arrays, images = index.arrays, images_of(index)
    labels, crowd = arrays["object_labels"], arrays["crowd"]
    size = np.digitize(arrays["area"], [SMALL, MEDIUM])
    per_class, having = {}, np.zeros(len(classes), dtype=np.int64)
    for label, name in enumerate(classes):
        chosen = (labels == label) & ~crowd
        having[label] = len(np.unique(images[chosen]))
        counted = dict(zip(SIZES, np.bincount(size[chosen], minlength=len(SIZES)).tolist(), strict=True))
        crowds = int(((labels == label) & crowd).sum())
        per_class[name] = {"images": int(having[label]), "objects": int(chosen.sum()), "crowds": crowds, **counted}
    of_classes = describe_counts(having, classes)
    return {**of_classes, "objects": per_class, "odd_objects": list_odd(config, index, images)}


def images_of(index: ObjectIndex) -> np.ndarray:
    """Give the image that each object is in, ``(n,)``."""
    return np.repeat(np.arange(len(index)), np.diff(index.arrays["offsets"]))


def list_odd(config: Config, index: ObjectIndex, images: np.ndarray) -> dict[str, list[str]]:
    """List what is odd about the objects of a split and may be wrong, in words."""
    arrays, known = index.arrays, ~index.arrays["crowd"]
    has_mask = np.diff(arrays["segment_ends"], prepend=0) > 0
    longest, shortest = config.AUG.RESIZE
    tiny = resized_sides(index, images, longest, shortest) < LEAST_SIDE
    again = doubled(arrays["boxes"], arrays["object_labels"], images)
    found = {
        f"boxes with a side below {LEAST_SIDE} pixels once the image is within {longest} x {shortest}": tiny,
        "boxes that stand twice in an image, with the same class": again,
        f"boxes that differ from their masks by over {100 * TOLERANCE:.0f} % of a side": differ_from_masks(
            index, images
        ),
    }
    if wants_masks(config) and has_mask.any():
        found["objects without a mask"] = ~has_mask
    lists = {what: [tell(index, images, i) for i in np.flatnonzero(it & known).tolist()] for what, it in found.items()}
    without = [index.name(i) for i in np.flatnonzero(index.counts == 0).tolist()]
    return {"boxes cut at the edge of the image": [*cut_boxes(index)], **lists, "images without objects": without}


def tell(index: ObjectIndex, images: np.ndarray, i: int) -> str:
    """Name an object by its image, its class and its box."""
    left, top, right, bottom = (f"{x:.6g}" for x in index.arrays["boxes"][i])
    name = index.classes[index.arrays["object_labels"][i]]
    return f"{index.name(images[i])}: {name} from {left}, {top} to {right}, {bottom}"


def cut_boxes(index: ObjectIndex) -> Iterator[str]:
    """Name the boxes that reach out of their images, which the index does not know any more."""
    content = AnnotationFile(index.annotation_file).content
    images = {one["id"]: one for one in content["images"]}
    for one in content["annotations"]:
        (x, y, w, h), image = one["bbox"], images[one["image_id"]]
        beyond = max(-x, -y, x + w - image["width"], y + h - image["height"])
        if min(w, h) > 0 and beyond > ROUNDING:
            yield f"{image['file_name']}: annotation {one['id']}, by {beyond:.6g} pixels"


def resized_sides(index: ObjectIndex, images: np.ndarray, longest: int, shortest: int) -> np.ndarray:
    """Give the shorter side of each box, ``(n,)`` pixels, once its image is resized."""
    whole = np.array([brought_within(height, width, longest, shortest) for height, width in index.sizes.tolist()])
    scale, boxes = (whole / index.sizes)[images], index.arrays["boxes"]
    return ((boxes[:, 2:] - boxes[:, :2]) * scale[:, ::-1]).min(axis=1)


def doubled(boxes: np.ndarray, labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Find the objects that are the same as one before in box, class and image, ``(n,)`` bool."""
    _, first = np.unique(np.column_stack([images, labels, boxes]), axis=0, return_index=True)
    again = np.ones(len(boxes), dtype=bool)
    again[first] = False
    return again


def differ_from_masks(index: ObjectIndex, images: np.ndarray) -> np.ndarray:
    """Find the objects whose mask has another box than they have, ``(n,)`` bool; an empty mask has another."""
    arrays, differ = index.arrays, np.zeros(len(images), dtype=bool)
    data, sizes, start = arrays["segments"], index.sizes, 0
    for i, end in enumerate(arrays["segment_ends"].tolist()):
        if end > start:
            encoded = {"size": sizes[images[i]].tolist(), "counts": data[start:end].tobytes()}
            (x, y, w, h), box = rle.toBbox(encoded), arrays["boxes"][i]
            sides = np.tile(box[2:] - box[:2], 2)
            # A mask has whole pixels: it may reach one further than a box has it
            differ[i] = bool((np.abs(np.array([x, y, x + w, y + h]) - box) > np.maximum(TOLERANCE * sides, 1)).any())
        start = end
    return differ


def object_table(report: dict, classes: list[str]) -> Table:
    """Tabulate images, objects, crowds and sizes of each class and split."""
    columns = ("images", "objects", "crowds", *SIZES)
    rows = [
        [name, split, *(f"{of_split['objects'][name][key]:,}" for key in columns)]
        for name in classes
        for split, of_split in report["splits"].items()
    ]
    title = "classes; small objects have less than 32^2 pixels, large ones 96^2 or more"
    return Table(title, ["", "", *columns], rows)


def preview(config: Config, split: Inspection, index: ObjectIndex, classes: list[str]) -> bytes | None:
    """Draw the first sound images of epoch 0 with their objects: as they are, and as training sees them in two epochs.

    Returns:
        a PNG; None when there is no sound image.
    """
    faulty = np.concatenate([split.having(kind) for kind in FAULTS])
    order = epoch_order(config.SEED, 0, len(index))
    chosen = order[~np.isin(order, faulty)][:SHOWN].tolist()
    if not chosen:
        return None
    decoding, masks = build_decoding(config), wants_masks(config) and index.has_masks
    sample = DecodeObjects(decoding, build_object_transform(config), masks)
    dataset = ImageDataset(index, sample, config.SEED, replace_bad=False)
    rows = {"as they are": [draw_whole(*index[i], decoding, classes, masks) for i in chosen]}
    for epoch in (0, 1):
        seen = [cast(Sample, dataset[epoch, i].sample) for i in chosen]
        rows[f"as in training, epoch {epoch}"] = [draw_sample(each, classes) for each in seen]
    (longest, shortest), (low, high) = config.AUG.RESIZE, config.AUG.RESIZE_RATIO
    heading = f"images within {longest} x {shortest} pixels, times {low:g} to {high:g}"
    return draw_rows(rows, [], heading, len(chosen), CELL)


def draw_whole(data: bytes, objects: Objects, decoding: Decoding, classes: list[str], masks: bool) -> Image.Image:
    """Draw an image with the objects that its annotations have; crowds are left out, as in training."""
    there = np.flatnonzero(~objects.crowd)
    pixels = objects.masks(there.tolist()) > 0 if masks else None
    picture = tensor_to_pil(decode(data, decoding))
    return small(draw_objects(picture, objects.boxes[there], objects.labels[there], classes, None, pixels))


def draw_sample(sample: Sample, classes: list[str]) -> Image.Image:
    """Draw an image with the objects that training gets."""
    target = cast(dict[str, np.ndarray], sample.target)
    packed, width = target.get("masks"), sample.image.shape[2]
    masks = None if packed is None else np.unpackbits(packed, axis=-1, count=width).astype(bool)
    picture = tensor_to_pil(sample.image)
    return small(draw_objects(picture, target["boxes"], target["labels"], classes, None, masks))


def small(picture: Image.Image) -> Image.Image:
    """Make it fit its place in the sheet."""
    picture.thumbnail((CELL, CELL))
    return picture
