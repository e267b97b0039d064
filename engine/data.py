"""The data of a classification: images and their classes."""

from typing import NamedTuple

import torch

from data.augmentation import (
    DeviceStage,
    augments_on_device,
    build_eval_transform,
    build_train_stage,
    build_train_transform,
)
from data.build import build_eval_loader, build_train_loader, check_num_classes, keep_in_memory, open_images
from data.dataset import DecodeAndTransform
from data.decoding import build_decoding
from data.files import describe_left_out
from data.loading import EvalLoader, TrainLoader


class Loaders(NamedTuple):
    """What a run reads. ``train`` is None in evaluation."""

    train: TrainLoader | None
    val: EvalLoader
    classes: list[str]
    augments_on_device: bool

    def left_out(self) -> str:
        """One line about the files that lie in the data and are not used; empty where there are none."""
        train = self.train.dataset.index if self.train else None
        return describe_left_out({"train": train, "val": self.val.dataset.index})


def build_loaders(config, device: torch.device, training: bool = True) -> Loaders:
    """Loaders of ``config.DATA.DATA_PATH``; the classes are those of its training images (or val's, without any).

    Raises:
        UserError: something is missing, damaged or empty, or there are too few images for one step.
    """
    train_index, val_index, classes = open_images(config, training)
    check_num_classes(config, classes)
    keep_in_memory(config, *([train_index] if training else []), val_index)
    train, on_device, decoding = None, training and augments_on_device(config, device), build_decoding(config)
    if training:
        transform, stage = build_train_transform(config, on_device), build_train_stage(config, device)
        sample = DecodeAndTransform(transform, decoding)
        train = build_train_loader(config, train_index, sample, transform.size, stage)
    transform = build_eval_transform(config)
    stage = DeviceStage(device, config.DATA.MEAN, config.DATA.STD)
    val = build_eval_loader(config, val_index, DecodeAndTransform(transform, decoding), transform.size, stage)
    return Loaders(train, val, classes, on_device)
