"""What training and evaluation make of an image and its label map: the same of both. Source: the published recipe."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.augmentation.policy import Patch, Plan
from utils.image_size import height_and_width

VOID = 255
"""What no class is, in the label maps that a model is trained on and evaluated with."""
CROPS_TRIED = 10
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 0.1
"""Of photometric distortion: grey levels to add, factors, and a share of the circle of hues."""


@dataclass
class PairTransform:
    """Resizes at random, crops, flips and changes colours; what is missing of the crop is void.

    It draws from torch's global generator.

    Args:
        size: height and width of the result.
        bounds: longest and shortest side that an image is brought within, its shape kept.
        ratio: what these are multiplied by, from and to.
        most_of_one_class: a crop of which one class has a larger share is drawn again, up to CROPS_TRIED times.
        hflip: probability of a flip.
        distort: probability of each of the changes of colour.
    """

    size: tuple[int, int]
    bounds: tuple[int, int]
    ratio: tuple[float, float]
    most_of_one_class: float
    hflip: float
    distort: float

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Turn ``(3, H, W)`` and ``(H, W)`` uint8 into ``(3, *size)``, ``(*size)`` and a plan for the padding."""
        scale = float(torch.empty(()).uniform_(*self.ratio))
        size = list(brought_within(*labels.shape, *(scale * bound for bound in self.bounds)))
        labels = F.resize(labels[None], size, InterpolationMode.NEAREST)[0]
        top, left = self.draw_crop(labels)
        height, width = (min(there, wanted) for there, wanted in zip(size, self.size, strict=True))
        labels = labels[top : top + height, left : left + width]
        image = F.resize(image, size, InterpolationMode.BILINEAR, antialias=False)
        image = image[:, top : top + height, left : left + width]
        if torch.rand(()) < self.hflip:
            image, labels = F.horizontal_flip(image), F.horizontal_flip(labels)
        image = distort(image, self.distort) if self.distort else image
        padding = [0, 0, self.size[1] - width, self.size[0] - height]
        return (
            F.pad(image, padding),
            F.pad(labels[None], padding, fill=VOID)[0],
            Plan(patches=blanks(height, width, *self.size)),
        )

    def draw_crop(self, labels: Tensor) -> tuple[int, int]:
        """Draw the top left corner of a crop of a label map ``(H, W)``."""
        for _ in range(CROPS_TRIED):
            top, left = (
                int(torch.randint(max(there - wanted, 0) + 1, ()))
                for there, wanted in zip(labels.shape, self.size, strict=True)
            )
            if self.most_of_one_class == 1:
                break
            counts = labels[top : top + self.size[0], left : left + self.size[1]].flatten().bincount()[:VOID]
            if (counts > 0).sum() > 1 and counts.max() < self.most_of_one_class * counts.sum():
                break
        return top, left


def brought_within(height: int, width: int, longest: float, shortest: float) -> tuple[int, int]:
    """Find the largest size with the shape of ``height x width`` whose sides are at most these."""
    scale = min(longest / max(height, width), shortest / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def blanks(height: int, width: int, whole_height: int, whole_width: int) -> tuple[Patch, ...]:
    """Cover what a picture of ``height x width`` in the top left corner leaves of the whole."""
    right = Patch(0, width, whole_height, whole_width - width, 0)
    below = Patch(height, 0, whole_height - height, width, 0)
    return tuple(patch for patch in (right, below) if patch.height and patch.width)


def distort(image: Tensor, probability: float) -> Tensor:
    """Change brightness, contrast, saturation and hue of ``(3, H, W)`` uint8, each with this probability.

    Contrast comes before or after the colours. Saturation is torchvision's, which keeps the luma.
    """

    def drawn() -> bool:
        return bool(torch.rand(()) < probability)

    def between(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high))

    def contrast(image: Tensor) -> Tensor:
        return F.adjust_brightness(image, between(*CONTRAST)) if drawn() else image  # it multiplies, as is meant here

    if drawn():
        image = (image.short() + round(between(-BRIGHTNESS, BRIGHTNESS))).clamp(0, 255).to(torch.uint8)
    first = bool(torch.rand(()) < 0.5)
    image = contrast(image) if first else image
    if drawn():
        image = F.adjust_saturation(image, between(*SATURATION))
    if drawn():
        image = F.adjust_hue(image, between(-HUE, HUE))
    return image if first else contrast(image)


def build_pair_transform(config) -> PairTransform:
    """Build the published recipe of semantic segmentation."""
    aug = config.AUG
    return PairTransform(
        size=height_and_width(config.DATA.IMG_SIZE),
        bounds=tuple(aug.RESIZE),
        ratio=tuple(aug.RESIZE_RATIO),
        most_of_one_class=aug.MOST_OF_ONE_CLASS,
        hflip=aug.HFLIP,
        distort=aug.DISTORT,
    )
