"""From decoded pixels to a uint8 image of the size that the model takes. Source: the published recipe."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.augmentation.policy import Plan, Recorder, build_policy, draw_patches
from data.decoding import pil_to_tensor, tensor_to_pil
from utils.image_size import height_and_width


@dataclass
class TrainTransform:
    """Crops and flips at random; what is left to do is drawn as a plan.

    It draws from the global generators of Python, numpy and torch.

    Args:
        size: height and width of the result.
        scale: the crop's share of the image's area, from and to.
        ratio: its width over its height, from and to.
        interpolation: of the crop.
        hflip: probability of a flip.
        policy: transforms of a PIL image to run here.
        recorder: draws operations to be run on the device instead.
        erase_probability, erase_count: of random erasing, and how many rectangles at most.
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
        """Turn ``(3, H, W)`` uint8 into ``(3, *size)`` uint8 and what remains to be done to it."""
        image = self.crop_and_flip(image)
        if self.policy:
            image = self.run_policy(image)
        return image, self.draw_plan()

    def crop_and_flip(self, image: Tensor) -> Tensor:
        """Turn ``(3, H, W)`` uint8 into ``(3, *size)`` uint8."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        image = image[None, :, top : top + height, left : left + width]
        # Resizing is twice as fast on packed pixels
        image = image.contiguous(memory_format=torch.channels_last)
        image = F.resize(image, list(self.size), self.interpolation, antialias=True)[0]
        return F.horizontal_flip(image) if torch.rand(1) < self.hflip else image

    def run_policy(self, image: Tensor) -> Tensor:
        """Run the policy on an image ``(3, H, W)`` uint8."""
        picture = tensor_to_pil(image)
        for transform in self.policy:
            picture = transform(picture)
        return pil_to_tensor(picture)

    def draw_plan(self) -> Plan:
        """Draw what the device has to do to one image."""
        operations = self.recorder.draw()
        return Plan(operations, draw_patches(self.erase_probability, self.erase_count, *self.size))


def build_train_transform(config, on_device: bool) -> TrainTransform:
    """Build the published recipe; ``on_device`` leaves the policy to the device."""
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
    """Resizes to ``resize`` and crops the centre of ``size``, each a height and a width.

    ``keep_ratio`` lets the resized image be as much larger than ``resize`` as its shape needs.
    """

    size: tuple[int, int]
    resize: tuple[int, int]
    keep_ratio: bool
    interpolation: InterpolationMode

    def __call__(self, image: Tensor) -> tuple[Tensor, Plan]:
        """Turn ``(3, H, W)`` uint8 into ``(3, *size)`` uint8 and an empty plan."""
        height, width = image.shape[1:]
        resize = cover(height, width, *self.resize) if self.keep_ratio else self.resize
        image = F.resize(image, list(resize), self.interpolation, antialias=True)
        return F.center_crop(image, list(self.size)), Plan()


def cover(height: int, width: int, over_height: int, over_width: int) -> tuple[int, int]:
    """Find the smallest size with the shape of ``height x width`` that covers ``over_height x over_width``.

    Fractions of a pixel are cut off, as torchvision does when it resizes the short side.
    """
    if height * over_width <= width * over_height:
        return over_height, max(over_width, int(over_height * width / height))
    return max(over_height, int(over_width * height / width)), over_width


def build_eval_transform(config) -> EvalTransform:
    """Build what resizes and crops the centre (``TEST.CROP``), or resizes to the size that the model sees.

    Five crops are for the device to make.
    """
    size = height_and_width(config.DATA.IMG_SIZE)
    height, width = (round(side / config.TEST.CROP_PCT) for side in size)
    resize = (height, width) if config.TEST.CROP else size
    if config.TEST.VIEWS == "five_crop":
        size = resize
    return EvalTransform(size, resize, config.TEST.CROP, InterpolationMode(config.DATA.INTERPOLATION))
