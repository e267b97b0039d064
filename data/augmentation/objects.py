"""What training and evaluation make of an image with objects: of image, boxes and masks alike.

Source: the published recipes, and large-scale jitter (arXiv 2012.07177, section 3).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.augmentation.pairs import brought_within
from utils.image_size import height_and_width


class Transformed(NamedTuple):
    """An image with the objects that are still in it.

    Attributes:
        image: ``(3, h, w)`` uint8.
        boxes: ``(n, 4)`` float32, x1 y1 x2 y2, of those that are still there.
        stay: which these are of all, bool.
        rows, columns: of the original image, that each row ``(h,)`` and column ``(w,)`` of a mask shows.
    """

    image: Tensor
    boxes: Tensor
    stay: Tensor
    rows: Tensor
    columns: Tensor


@dataclass
class ObjectTransform:
    """Resizes, crops at random and flips; it draws from torch's global generator.

    Args:
        bounds: longest and shortest side that an image is brought within, its shape kept.
        ratio: what these are multiplied by, from and to.
        crop: sides of what is cut out at random where the image is larger, the longer one along the image's; None
            crops nothing.
        hflip: probability of a flip.
    """

    bounds: tuple[int, int]
    ratio: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    hflip: float = 0.0

    def __call__(self, image: Tensor, boxes: Tensor) -> Transformed:
        """Transform an image ``(3, H, W)`` uint8, and the boxes ``(n, 4)`` float32, x1 y1 x2 y2, of its objects."""
        size = (image.shape[1], image.shape[2])
        image = tv_tensors.Image(image)
        corners = tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)
        wanted = self.draw_size(*size)
        rows, columns = (nearest(*sides) for sides in zip(size, wanted, strict=True))
        image = F.resize(image, list(wanted), InterpolationMode.BILINEAR, antialias=False)
        corners = F.resize(corners, list(wanted))
        if self.crop is not None:
            top, left, height, width = draw_crop(wanted, self.crop)
            image, corners = (F.crop(x, top, left, height, width) for x in (image, corners))
            rows, columns = rows[top : top + height], columns[left : left + width]
        if self.hflip and torch.rand(()) < self.hflip:
            image, corners, columns = F.horizontal_flip(image), F.horizontal_flip(corners), columns.flip(0)
        boxes = F.clamp_bounding_boxes(corners).as_subclass(Tensor)
        stay = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Transformed(image.as_subclass(Tensor), boxes[stay], stay, rows, columns)

    def draw_size(self, height: int, width: int) -> tuple[int, int]:
        """Draw the ratio, and tell what size it gives an image."""
        low, high = self.ratio
        scale = float(torch.empty(()).uniform_(low, high)) if low < high else low
        return brought_within(height, width, *(scale * bound for bound in self.bounds))


def draw_crop(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of what is cut out of a size: these sides at most, the longer one along its."""
    along = sorted(wanted, reverse=size[0] > size[1])
    height, width = (min(sides) for sides in zip(size, along, strict=True))
    top, left = (int(torch.randint(side - cut + 1, ())) for side, cut in zip(size, (height, width), strict=True))
    return top, left, height, width


def packed_masks(masks: np.ndarray, rows: Tensor, columns: Tensor) -> np.ndarray:
    """Give masks the rows and columns of a :class:`Transformed` image.

    One look-up in place of resizing, cropping and flipping takes a quarter of the time, and never has masks of many
    objects at twice the size of an image, which would be gigabytes.

    Args:
        masks: ``(n, H, W)`` uint8 of 0 and 1.

    Returns:
        ``(n, h, ceil(w / 8))`` uint8, the first of eight pixels in the highest bit.
    """
    return np.packbits(masks.take(columns.numpy(), axis=2), axis=2).take(rows.numpy(), axis=1)


def nearest(length: int, wanted: int) -> Tensor:
    """Tell which pixel each one becomes when a side is resized with nearest interpolation, ``(wanted,)`` int64."""
    numbers = torch.arange(length, dtype=torch.float32)[None, :, None]
    return F.resize(numbers, [wanted, 1], InterpolationMode.NEAREST)[0, :, 0].long()


def build_object_transform(config) -> ObjectTransform:
    """Build what training does to images with objects."""
    aug = config.AUG
    bounds, ratio = (aug.RESIZE[0], aug.RESIZE[1]), (aug.RESIZE_RATIO[0], aug.RESIZE_RATIO[1])
    return ObjectTransform(bounds, ratio, height_and_width(config.DATA.IMG_SIZE) if aug.CROP else None, aug.HFLIP)


def build_object_eval_transform(config) -> ObjectTransform:
    """Build what evaluation does: it resizes."""
    return ObjectTransform((config.TEST.RESIZE[0], config.TEST.RESIZE[1]))
