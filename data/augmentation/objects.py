"""What training and evaluation make of an image with objects: image, boxes and masks alike.

Source: the published recipes, and large-scale jitter (arXiv 2012.07177, section 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.augmentation.pairs import brought_within
from utils.image_size import height_and_width

Three = tuple[Tensor, Tensor, Tensor]


@dataclass
class ObjectTransform:
    """Resizes, crops at random and flips; it draws from torch's global generator.

    Args:
        bounds: longest and shortest side that an image is brought within, its shape kept.
        ratio: what these are multiplied by, from and to.
        crop: height and width of what is cut out at random where the image is larger; None crops nothing.
        hflip: probability of a flip.
    """

    bounds: tuple[int, int]
    ratio: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    hflip: float = 0.0

    def __call__(self, image: Tensor, boxes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Transform an image and its n objects.

        Args:
            image: ``(3, H, W)`` uint8.
            boxes: ``(n, 4)`` float32, x1 y1 x2 y2.
            masks: ``(n, H, W)`` uint8; ``(0, H, W)`` where they are not wanted.

        Returns:
            all three, of the objects that are still there; and which these are, ``(n,)`` bool.
        """
        size = (image.shape[1], image.shape[2])
        parts: Three = (
            tv_tensors.Image(image),
            tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size),
            tv_tensors.Mask(masks),
        )
        parts = self.resize(*parts)
        if self.crop is not None:
            parts = self.crop_at_random(*parts, self.crop)
        if self.hflip and torch.rand(()) < self.hflip:
            parts = F.horizontal_flip(parts[0]), F.horizontal_flip(parts[1]), F.horizontal_flip(parts[2])
        image, boxes, masks = (part.as_subclass(Tensor) for part in parts)
        stay = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if len(masks) and not stay.all():  # to choose all of them would take as long as to resize them
            masks = masks[stay]
        return image, boxes[stay], masks, stay

    def resize(self, image: Tensor, boxes: Tensor, masks: Tensor) -> Three:
        """Bring the image within the bounds, times a ratio that is drawn."""
        low, high = self.ratio
        scale = float(torch.empty(()).uniform_(low, high)) if low < high else low
        size = list(brought_within(image.shape[1], image.shape[2], *(scale * bound for bound in self.bounds)))
        boxes = F.clamp_bounding_boxes(F.resize(boxes, size))
        masks = F.resize(masks, size, InterpolationMode.NEAREST)
        return F.resize(image, size, InterpolationMode.BILINEAR, antialias=False), boxes, masks

    def crop_at_random(self, image: Tensor, boxes: Tensor, masks: Tensor, wanted: tuple[int, int]) -> Three:
        """Cut out what is at most as large as wanted; boxes are clipped, and may have no extent then."""
        there = (image.shape[1], image.shape[2])
        height, width = (min(sides) for sides in zip(there, wanted, strict=True))
        top, left = (int(torch.randint(side - cut + 1, ())) for side, cut in zip(there, (height, width), strict=True))
        box = top, left, height, width
        return F.crop(image, *box), F.clamp_bounding_boxes(F.crop(boxes, *box)), F.crop(masks, *box)


def build_object_transform(config) -> ObjectTransform:
    """Build what training does to images with objects; a RESIZE_RATIO other than [1, 1] crops to IMG_SIZE."""
    aug = config.AUG
    bounds, ratio = (aug.RESIZE[0], aug.RESIZE[1]), (aug.RESIZE_RATIO[0], aug.RESIZE_RATIO[1])
    return ObjectTransform(
        bounds, ratio, None if ratio == (1, 1) else height_and_width(config.DATA.IMG_SIZE), aug.HFLIP
    )


def build_object_eval_transform(config) -> ObjectTransform:
    """Build what evaluation does: it resizes."""
    return ObjectTransform((config.TEST.RESIZE[0], config.TEST.RESIZE[1]))
