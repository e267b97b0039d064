"""From decoded pixels to a uint8 image of the size that the model takes. Source: the published recipe."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.decoding import pil_to_tensor, tensor_to_pil
from data.policy import Plan, Recorder, build_policy, draw_patches
from utils.image_size import height_and_width


@dataclass
class TrainTransform:
    """Random crop and flip; the rest of the augmentation as a plan, or done here with Pillow as far as ``policy`` goes.

    It draws from the global generators of Python, numpy and torch.

    Args:
        policy: transforms of a PIL image to run here.
        recorder: draws operations to be run on the device instead.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: InterpolationMode
    hflip: float
    policy: list[Callable]
    recorder: Recorder
    erase_probability: float
    erase_count: int

    def __call__(self, image: Tensor) -> tuple[Tensor, Plan]:
        """``(3, H, W)`` uint8 to ``(3, *size)`` uint8 and what remains to be done to it."""
        image = self.crop_and_flip(image)
        if self.policy:
            image = self.run_policy(image)
        return image, self.draw_plan()

    def crop_and_flip(self, image: Tensor) -> Tensor:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        image = image[None, :, top : top + height, left : left + width]
        # Resizing is twice as fast on packed pixels
        image = image.contiguous(memory_format=torch.channels_last)
        image = F.resize(image, list(self.size), self.interpolation, antialias=True)[0]
        return F.horizontal_flip(image) if torch.rand(1) < self.hflip else image

    def run_policy(self, image: Tensor) -> Tensor:
        picture = tensor_to_pil(image)
        for transform in self.policy:
            picture = transform(picture)
        return pil_to_tensor(picture)

    def draw_plan(self) -> Plan:
        operations = self.recorder.draw()
        return Plan(operations, draw_patches(self.erase_probability, self.erase_count, *self.size))


def build_train_transform(config, on_device: bool) -> TrainTransform:
    """The published recipe; ``on_device`` leaves the policy to the device."""
    aug = config.AUG
    policy = build_policy(config)
    return TrainTransform(
        size=height_and_width(config.DATA.IMG_SIZE),
        scale=tuple(aug.SCALE),
        ratio=tuple(aug.RATIO),
        interpolation=InterpolationMode(config.DATA.INTERPOLATION),
        hflip=aug.HFLIP,
        policy=[] if on_device else policy,
        recorder=Recorder(policy if on_device else []),
        erase_probability=aug.REPROB,
        erase_count=aug.RECOUNT,
    )


@dataclass
class EvalTransform:
    """Resize to ``resize`` and crop the centre of ``size``, each a height and a width.

    ``keep_ratio`` lets the resized image be as much larger than ``resize`` as its shape needs.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    keep_ratio: bool
    interpolation: InterpolationMode

    def __call__(self, image: Tensor) -> tuple[Tensor, Plan]:
        """``(3, H, W)`` uint8 to ``(3, *size)`` uint8; nothing remains to be done."""
        height, width = image.shape[1:]
        resize = cover(height, width, *self.resize) if self.keep_ratio else self.resize
        image = F.resize(image, list(resize), self.interpolation, antialias=True)
        return F.center_crop(image, list(self.size)), Plan()


def cover(height: int, width: int, over_height: int, over_width: int) -> tuple[int, int]:
    """The size of an image whose one side is that of what it is to cover, and whose other is as large or larger.

    Fractions of a pixel are cut off, as torchvision does when it resizes the short side.
    """
    if height * over_width <= width * over_height:
        return over_height, max(over_width, int(over_height * width / height))
    return max(over_height, int(over_width * height / width)), over_width


def build_eval_transform(config) -> EvalTransform:
    """Resize and crop the centre (``TEST.CROP``), or resize to the size that the model sees.

    Five crops are for the device to make.
    """
    size = height_and_width(config.DATA.IMG_SIZE)
    height, width = (round(side / config.TEST.CROP_PCT) for side in size)
    resize = (height, width) if config.TEST.CROP else size
    if config.TEST.VIEWS == "five_crop":
        size = resize
    return EvalTransform(size, resize, config.TEST.CROP, InterpolationMode(config.DATA.INTERPOLATION))
