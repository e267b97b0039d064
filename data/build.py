"""From a config to loaders."""

from pathlib import Path
from typing import NamedTuple

import torch

from data.dataset import ImageDataset
from data.index import FolderIndex, class_names
from data.loading import EvalLoader, TrainLoader
from data.sampling import EvalBatches, TrainBatches
from data.transforms import build_eval_transform, build_train_transform
from utils.distributed import rank, world_size
from utils.errors import UserError

LAYOUT = "expected DATA_PATH/train/CLASS/*.jpg and DATA_PATH/val/CLASS/*.jpg"


class Loaders(NamedTuple):
    """What a run reads. ``train`` is None in evaluation."""

    train: TrainLoader | None
    val: EvalLoader
    classes: list[str]


def build_loaders(config, device: torch.device, training: bool = True) -> Loaders:
    """Loaders of ``config.DATA.DATA_PATH``; the classes are its training folders (or val's, where it has no train).

    Raises:
        UserError: a folder is missing or empty, or there are too few images for one step.
    """
    root = Path(config.DATA.DATA_PATH)
    if not config.DATA.DATA_PATH:
        raise UserError(f"DATA.DATA_PATH is not set: give --data-path DIR ({LAYOUT})")
    if not root.is_dir():
        raise UserError(f"DATA.DATA_PATH {root} is not a folder; {LAYOUT}")
    train_folder = root / "train"
    val_folder = next((root / name for name in ("val", "validation") if (root / name).is_dir()), root / "val")
    for folder in (train_folder, val_folder) if training else (val_folder,):
        if not folder.is_dir():
            raise UserError(f"DATA.DATA_PATH {root} has no folder '{folder.name}'; {LAYOUT}")
    classes = class_names(train_folder if train_folder.is_dir() else val_folder)
    if config.MODEL.NUM_CLASSES not in (0, len(classes)):
        raise UserError(
            f"MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}, but {root} has {len(classes)} class folders; "
            "leave it at 0 to take the number from the data"
        )

    replace_bad = config.DATA.ON_BAD_IMAGE == "skip"
    train = None
    if training:
        dataset = ImageDataset(
            FolderIndex(train_folder, classes), build_train_transform(config), config.SEED, replace_bad
        )
        batches = TrainBatches(
            len(dataset),
            config.DATA.BATCH_SIZE,
            config.TRAIN.ACCUMULATION_STEPS,
            rank(),
            world_size(),
            config.SEED,
        )
        if batches.steps_per_epoch == 0:
            raise UserError(
                f"{train_folder} has {len(dataset)} images, fewer than one step takes: DATA.BATCH_SIZE "
                f"{config.DATA.BATCH_SIZE} x TRAIN.ACCUMULATION_STEPS {config.TRAIN.ACCUMULATION_STEPS} x "
                f"{world_size()} processes = {batches.global_batch}; use a smaller --batch-size"
            )
        train = TrainLoader(dataset, batches, config.DATA.NUM_WORKERS, device)
    # An image that cannot be decoded is never replaced here: every image counts once or not at all
    dataset = ImageDataset(FolderIndex(val_folder, classes), build_eval_transform(config), config.SEED, False)
    batches = EvalBatches(len(dataset), config.DATA.BATCH_SIZE, rank(), world_size())
    return Loaders(train, EvalLoader(dataset, batches, config.DATA.NUM_WORKERS, device), classes)
