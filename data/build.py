"""From a config to loaders."""

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np

from data.augmentation import DeviceStage
from data.coco import EXPECTED as EXPECTED_COCO
from data.coco import ObjectIndex, check_same_classes, find_coco_layout
from data.dataset import ImageDataset, Sample
from data.index import ImageIndex, Index, open_index
from data.loading import EvalLoader, TrainLoader
from data.pair_layouts import EXPECTED, find_pair_layout
from data.pairs import LabelMaps
from data.sampling import BalancedTrainBatches, EvalBatches, GroupedTrainBatches, TrainBatches
from data.splits import root_of
from utils.distributed import local_rank, once_a_host, rank, world_size
from utils.errors import UserError
from utils.rules import HEADS_WITH_MASKS


def build_train_loader(
    config,
    index: Index,
    sample: Callable[[Any, bool], Sample],
    size: tuple[int, int] | None,
    stage: DeviceStage,
    groups: np.ndarray | None = None,
) -> TrainLoader:
    """Build the loader of this rank's training batches.

    Args:
        index: the training images.
        sample: makes a sample of ``index[i]``; see :class:`data.dataset.ImageDataset`.
        size: height and width of every sample's image. Without it the images of a batch are of any sizes, and its
            images and targets are lists.
        stage: makes float images on the device of uint8 images and their plans.
        groups: the group of each image ``(N,)``; a micro-batch has images of one group then.

    Raises:
        UserError: there are too few images for one step.
    """
    work = config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS, rank(), world_size(), config.SEED
    batches = (
        BalancedTrainBatches(labels_of(index, "DATA.SAMPLER balanced"), *work)
        if config.DATA.SAMPLER == "balanced"
        else TrainBatches(len(index), *work, config.AUG.REPEATS)
    )
    if batches.steps_per_epoch and groups is not None:
        batches = GroupedTrainBatches(groups, *work)
        check_groups(config, batches)
    if batches.steps_per_epoch == 0:
        raise UserError(
            f"{config.DATA.DATA_PATH} has {len(index)} training images, fewer than one step takes: "
            f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x TRAIN.ACCUMULATION_STEPS "
            f"{config.TRAIN.ACCUMULATION_STEPS} x {world_size()} processes = {batches.global_batch}; "
            "use a smaller --batch-size"
        )
    dataset = ImageDataset(index, sample, config.SEED, replace_bad=config.DATA.ON_BAD_IMAGE == "skip")
    return TrainLoader(dataset, batches, config.DATA.NUM_WORKERS, size, stage)


def labels_of(index: Index, wanted_by: str) -> np.ndarray:
    """List the class of each image, ``(N,)``.

    Raises:
        UserError: only reading the images would tell.
    """
    labels = getattr(index, "labels", None)
    if labels is None:
        raise UserError(f"{wanted_by} is for folders and archives; a data set of timm's does not list its classes")
    return labels


def check_groups(config, batches: GroupedTrainBatches) -> None:
    """Refuse groups of too few images for one step."""
    if batches.steps_per_epoch == 0:
        raise UserError(
            f"{config.DATA.DATA_PATH} has {batches.size} training images, but among its wide and its tall ones not the "
            f"{batches.global_batch // batches.batch_size} whole micro-batches of {batches.batch_size} that one step "
            "takes; use a smaller --batch-size, or DATA.BY_ORIENTATION False"
        )


def build_eval_loader(
    config, index: Index, sample: Callable[[Any, bool], Sample], size: tuple[int, int] | None, stage: DeviceStage
) -> EvalLoader:
    """Build the loader of this rank's share of the validation images; arguments as of :func:`build_train_loader`."""
    # An image that cannot be decoded is never replaced here: every image counts once or not at all
    dataset = ImageDataset(index, sample, config.SEED, replace_bad=False)
    batches = EvalBatches(len(index), config.DATA.BATCH_SIZE, rank(), world_size())
    return EvalLoader(dataset, batches, config.DATA.NUM_WORKERS, size, stage)


def open_pairs(config, training: bool) -> tuple[LabelMaps | None, LabelMaps, list[str]]:
    """Open the images with label maps in DATA.DATA_PATH.

    Returns:
        the index of the training images (None unless ``training``), that of the validation images, and the classes.

    Raises:
        UserError: something is missing, damaged or empty.
    """
    return once_a_host(lambda: _open_pairs(config, training))


def _open_pairs(config, training: bool) -> tuple[LabelMaps | None, LabelMaps, list[str]]:
    root = root_of(
        config, "images/train, images/val, masks/train, masks/val and classes.txt (see docs/segmentation.md)"
    )
    indexes: dict[str, LabelMaps] = {}
    for split in ("train", "val") if training else ("val",):
        layout = find_pair_layout(root, split)
        if layout is None:
            raise UserError(
                f"DATA.DATA_PATH {root} has no images with label maps for {split}; expected "
                f"{EXPECTED.format(split=split)} in it (see docs/segmentation.md)"
            )
        indexes[split] = cast(LabelMaps, open_index(layout, config.DATA.CACHE_DIR))
    return indexes.get("train"), indexes["val"], indexes["val"].classes


def open_objects(config, training: bool) -> tuple[ObjectIndex | None, ObjectIndex, list[str]]:
    """Open the images with objects in DATA.DATA_PATH.

    Returns:
        the index of the images to train on (None unless ``training``), that of the validation images, and the classes.

    Raises:
        UserError: something is missing, damaged or empty, has no object, or the splits have other classes.
    """
    indexes = once_a_host(lambda: open_coco(config, ["train", "val"] if training else ["val"]))
    train, val = indexes.get("train"), indexes["val"]
    if not val.counts.any():
        raise UserError(f"{val.annotation_file} has no objects but crowds; label some, to evaluate with")
    if train is not None:
        check_masks(wants_masks(config), train)
        train = train if config.DATA.EMPTY_IMAGES else with_objects(train)
    return train, val, val.classes


def open_coco(config, splits: Iterable[str]) -> dict[str, ObjectIndex]:
    """Open these splits as their files have them.

    Raises:
        UserError: something is missing, damaged or empty, or the splits have other classes.
    """
    root = root_of(config, f"{EXPECTED_COCO.format(split='train')} (see docs/detection.md)")
    indexes: dict[str, ObjectIndex] = {}
    for split in splits:
        layout = find_coco_layout(root, split)
        if layout is None:
            raise UserError(
                f"DATA.DATA_PATH {root} has no annotations of {split}; expected {EXPECTED_COCO.format(split=split)} in "
                "it (scripts/voc_to_coco.py makes them of Pascal VOC's and YOLO's)"
            )
        indexes[split] = cast(ObjectIndex, open_index(layout, config.DATA.CACHE_DIR))
    if len(indexes) > 1:
        check_same_classes(indexes["train"], indexes["val"])
    return indexes


def wants_masks(config) -> bool:
    """Tell whether the settings ask for masks; whether the data has them is another question."""
    return config.DATA.MASKS == "auto" and config.MODEL.HEAD in HEADS_WITH_MASKS


def check_masks(wanted: bool, index: ObjectIndex) -> None:
    """Refuse images of which only some objects have masks, where these are wanted.

    Raises:
        UserError: so it is.
    """
    count = index.without_mask
    if wanted and 0 < count < index.counts.sum():
        raise UserError(
            f"{index.annotation_file} has {count:,} objects without a segmentation among {index.counts.sum():,}; add "
            "theirs, or train boxes alone: --opts DATA.MASKS none"
        )


def with_objects(index: ObjectIndex) -> ObjectIndex:
    """Leave out images without objects; crowds are none.

    Raises:
        UserError: nothing is left.
    """
    rows = np.flatnonzero(index.counts)
    if not len(rows):
        raise UserError(f"{index.annotation_file} has no objects but crowds; label some, to train on")
    return index if len(rows) == len(index) else index.select(rows)


def orientations(config, index: ObjectIndex) -> np.ndarray | None:
    """Group training images by what is wide, ``(N,)`` bool; None where DATA.BY_ORIENTATION does not ask for it."""
    return index.sizes[:, 1] > index.sizes[:, 0] if config.DATA.BY_ORIENTATION else None


def check_num_classes(config, classes: list[str]) -> None:
    """Refuse a MODEL.NUM_CLASSES that is not the number of classes in the data."""
    if config.MODEL.NUM_CLASSES not in (0, len(classes)):
        raise UserError(
            f"MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}, but {config.DATA.DATA_PATH} has {len(classes)} classes; "
            "leave it at 0 to take the number from the data"
        )


def fingerprint(index: Index) -> str:
    """Sum up the images' number, order and classes in a line that is another one for other data."""
    labels = getattr(index, "labels", None)
    digest = hashlib.blake2b(repr(getattr(index, "classes", None)).encode(), digest_size=6)
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).data)
    if isinstance(index, ObjectIndex):  # of whose images no one class could be said
        for _, array in sorted(index.arrays.items()):
            digest.update(np.ascontiguousarray(array).data)
    return f"{len(index):,} images ({digest.hexdigest()})"


def keep_in_memory(config, *indexes: Index) -> None:
    """Read the files before the run, as DATA.CACHE_MODE says: each process of a host a part of them, or all.

    Raises:
        UserError: a file cannot be read, or the index is not one of files.
    """
    mode = config.DATA.CACHE_MODE
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if mode == "part" else 1
    for index in indexes if mode != "no" else ():
        if not isinstance(index, ImageIndex):
            raise UserError("DATA.CACHE_MODE is for folders and archives; leave it at no for a data set of timm's")
        try:
            index.read_ahead(local_rank() % processes, processes)
        except OSError as error:
            raise UserError(
                f"DATA.CACHE_MODE {mode}: {error.filename or index.root} cannot be read: {error.strerror}"
            ) from error
