"""The check of images of classes, with what training makes of a few of them, to look at."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.augmentation import (
    augments_on_device,
    build_eval_transform,
    build_mixing,
    build_train_stage,
    build_train_transform,
)
from data.dataset import DecodeAndTransform, ImageDataset, Sample
from data.decoding import build_decoding, decode, pictures_of, tensor_to_pil
from data.files import describe_left_out
from data.index import Index
from data.inspection import Checked, inspect, make_report, open_splits
from data.sampling import epoch_order
from utils.contact_sheet import PER_ROW, draw_rows
from utils.image_size import height_and_width
from utils.randomness import seed_everything


def check_images(config, workers: int) -> Checked:
    """Check images of classes in at most so many processes.

    Raises:
        UserError: something is missing or does not fit, or a process was killed.
    """
    indexes, classes = open_splits(config)
    preview = Preview(config, len(classes))
    splits = {name: inspect(index, build_decoding(config), workers, name) for name, index in indexes.items()}
    first = next(iter(splits.values()))
    sheet = preview.draw(first.index, first.decoded(), classes)
    return Checked(make_report(config, splits, classes), describe_left_out(indexes), sheet, [])


class Preview:
    """The augmentation of a config, as training does it.

    Raises:
        UserError: a setting does not fit, so that training would not start.
    """

    def __init__(self, config, num_classes: int):
        self.config = config
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.transform = build_train_transform(config, augments_on_device(config, self.device))
        self.mixings = build_mixings(config, num_classes)

    def draw(self, index: Index, decoded: np.ndarray, classes: list[str]) -> bytes | None:
        """Draw the first images of epoch 0 as a PNG; None when there are not even two that can be decoded.

        Args:
            index: the images.
            decoded: the numbers of those that can be decoded.
            classes: the names of the classes.
        """
        config, decoding = self.config, build_decoding(self.config)
        order = epoch_order(config.SEED, 0, len(index))
        chosen = order[np.isin(order, decoded)][:PER_ROW].tolist()
        if len(chosen) < 2:
            return None
        dataset = ImageDataset(index, DecodeAndTransform(self.transform, decoding), config.SEED, replace_bad=False)
        stage, evaluation = build_train_stage(config, self.device), build_eval_transform(config)
        samples = {epoch: [cast(Sample, dataset[epoch, i].sample) for i in chosen] for epoch in (0, 1)}
        images = {epoch: stage(torch.stack([s.image for s in x]), [s.plan for s in x]) for epoch, x in samples.items()}
        targets = torch.tensor([sample.target for sample in samples[0]], device=self.device)
        rows = {"as in evaluation": [tensor_to_pil(evaluation(decode(index[i][0], decoding))[0]) for i in chosen]}
        rows |= {f"as in training, epoch {epoch}": self.pictures(x) for epoch, x in images.items()}
        for title, mixing in self.mixings.items():
            rows[title] = self.pictures(self.mix_neighbours(mixing, images[0], targets))
        return draw_rows(rows, [classes[target] for target in targets.tolist()], describe_augmentation(config))

    def mix_neighbours(self, mixing: Callable, images: Tensor, targets: Tensor) -> Tensor:
        """Mix each image with the next as in a step of its own, since one draw may hold for a whole batch."""
        mixed = []
        for step in range(len(images)):
            pair = [step, (step + 1) % len(images)]
            seed_everything(self.device, self.config.SEED, "step", step, 0, 0)
            mixed.append(mixing(images[pair], targets[pair])[0][0])
        return torch.stack(mixed)

    def pictures(self, images: Tensor) -> list[Image.Image]:
        """Undo the normalising of images ``(B, 3, H, W)``."""
        return pictures_of(images, self.config.DATA.MEAN, self.config.DATA.STD)


def build_mixings(config, num_classes: int) -> dict[str, Callable]:
    """Build mixup and cutmix, as far as they are on, each for every batch; the keys say how often they are drawn."""
    aug = config.AUG
    cutmix = bool(aug.CUTMIX or aug.CUTMIX_MINMAX)
    share = {"mixup": float(bool(aug.MIXUP)), "cutmix": float(cutmix)}
    if aug.MIXUP and cutmix:
        share = {"mixup": 1 - aug.MIXUP_SWITCH_PROB, "cutmix": aug.MIXUP_SWITCH_PROB}
    drawn_for = "batches" if aug.MIXUP_MODE == "batch" else "images"
    mixings = {}
    for name, of_all in share.items():
        if percent := 100 * of_all * aug.MIXUP_PROB:
            alone = config.clone()
            alone.defrost()
            alone.AUG.MIXUP_PROB = 1.0
            if name == "mixup":
                alone.AUG.CUTMIX, alone.AUG.CUTMIX_MINMAX = 0.0, []
            else:
                alone.AUG.MIXUP = 0.0
            title = f"{name} of epoch 0 with the next image ({percent:.0f} % of the {drawn_for})"
            mixings[title] = cast(Callable, build_mixing(alone, num_classes))
    return mixings


def describe_augmentation(config) -> str:
    """Put the settings of augmentation into a line."""
    aug, (height, width) = config.AUG, height_and_width(config.DATA.IMG_SIZE)
    policy = aug.AUTO_AUGMENT if aug.AUTO_AUGMENT != "none" else f"colour jitter {aug.COLOR_JITTER:g}"
    return (
        f"{height} x {width} pixels, crop of {100 * aug.SCALE[0]:g} to {100 * aug.SCALE[1]:g} % of the area, {policy}, "
        f"random erasing {aug.REPROB:g} ({aug.REMODE})"
    )
