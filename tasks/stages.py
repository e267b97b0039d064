"""What becomes of a training image with label map or objects, stage by stage, to see where a sample's time goes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from config import Config
from data.augmentation.objects import ObjectTransform, build_object_transform, packed_masks
from data.augmentation.pairs import build_pair_transform, distort
from data.build import open_objects, open_pairs, orientations, wants_masks
from data.coco import ObjectIndex
from data.dataset import Sample
from data.decoding import build_decoding, decode
from data.index import Index
from data.objects import DecodeObjects
from data.pairs import decode_labels
from tasks.segmentation import DecodePair, label_table

IMAGES = 100
"""That the stages work on, where there are so many."""
Stages = dict[str, Callable[[], object]]


@dataclass
class Input:
    """What the loader of a task makes batches of.

    Attributes:
        index: the training images.
        sample: makes a sample of ``index[i]``.
        size: height and width of all samples; None where each has its own.
        groups: of the images, ``(N,)``; a batch has images of one.
        images: how many each stage works on.
        stages: in the order of the work, each on one core.
    """

    index: Index
    sample: Callable[[Any, bool], Sample]
    size: tuple[int, int] | None
    groups: np.ndarray | None
    images: int
    stages: Stages


def pair_input(config: Config) -> Input:
    """Open the training images of segmentation.

    Raises:
        UserError: something is missing, damaged or empty.
    """
    index = open_pairs(config, training=True)[0]
    assert index is not None
    transform = build_pair_transform(config)
    sample = DecodePair(label_table(config, index, len(index.classes)), build_decoding(config), transform)
    chosen = range(min(len(index), IMAGES))
    raw = [index[i] for i in chosen]
    images = [decode(image, sample.decoding) for image, _ in raw]
    labels = [torch.from_numpy(sample.table[decode_labels(data)]) for _, data in raw]
    plain = replace(transform, distort=0.0)
    cropped = [plain(image, each)[0] for image, each in zip(images, labels, strict=True)]
    stages: Stages = {
        "read": lambda: [index[i] for i in chosen],
        "decode image": lambda: [decode(image, sample.decoding) for image, _ in raw],
        "decode label map": lambda: [np.take(sample.table, decode_labels(data)) for _, data in raw],
        "resize, crop, flip, pad": lambda: [plain(image, each) for image, each in zip(images, labels, strict=True)],
        "change colours": lambda: [distort(image, transform.distort) for image in cropped],
    }
    return Input(index, sample, transform.size, None, len(chosen), stages)


def object_input(config: Config) -> Input:
    """Open the training images of detection.

    Raises:
        UserError: something is missing, damaged or empty.
    """
    index = open_objects(config, training=True)[0]
    assert index is not None
    transform, masks = build_object_transform(config), wants_masks(config) and index.has_masks
    sample = DecodeObjects(build_decoding(config), transform, masks)
    stages = object_stages(index, sample, transform)
    return Input(index, sample, None, orientations(config, index), min(len(index), IMAGES), stages)


def object_stages(index: ObjectIndex, sample: DecodeObjects, transform: ObjectTransform) -> Stages:
    """Take apart what :class:`data.objects.DecodeObjects` does."""
    chosen = range(min(len(index), IMAGES))
    raw = [index[i] for i in chosen]
    there = [np.flatnonzero(~objects.crowd) for _, objects in raw]
    boxes = [torch.from_numpy(objects.boxes[known]) for (_, objects), known in zip(raw, there, strict=True)]
    images = [decode(image, sample.decoding) for image, _ in raw]
    stages: Stages = {
        "read": lambda: [index[i] for i in chosen],
        "decode image": lambda: [decode(image, sample.decoding) for image, _ in raw],
        "resize, crop, flip": lambda: [transform(*both) for both in zip(images, boxes, strict=True)],
    }
    if sample.masks:
        masks = [objects.masks(known.tolist()) for (_, objects), known in zip(raw, there, strict=True)]
        done = [transform(*both) for both in zip(images, boxes, strict=True)]
        to_pack = [(each[one.stay.numpy()], one.rows, one.columns) for each, one in zip(masks, done, strict=True)]
        stages["decode masks"] = lambda: [
            objects.masks(known.tolist()) for (_, objects), known in zip(raw, there, strict=True)
        ]
        stages["resize, crop, flip, pack masks"] = lambda: [packed_masks(*each) for each in to_pack]
    return stages
