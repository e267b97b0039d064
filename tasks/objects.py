"""How a detector sees an image of any size, and what it finds in it in the image's own pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import paste

Ask = Callable[..., Any]
"""A detector, or its ``forward``."""


class Found(NamedTuple):
    """The objects that were found in an image, the highest score first.

    Attributes:
        boxes: ``(N, 4)`` float32, left, top, right and bottom in pixels of the image.
        labels: ``(N,)`` int64.
        scores: ``(N,)`` float32.
        masks: ``(N, H, W)`` bool, or None where only boxes are found.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None

    def above(self, score: float) -> "Found":
        """Leave out what has a lower score."""
        keep = self.scores >= score
        return Found(*(None if part is None else part[keep] for part in self))  # type: ignore[arg-type]


def find_objects(
    ask: Ask, image: Tensor, size: tuple[int, int], multiple: int, masks: bool = True, score: float = 0.0
) -> Found:
    """Find the objects in an image ``(3, h, w)`` that was resized from ``size``, height and width.

    It is padded to a multiple of so many pixels and computed alone, so what it gets depends on no other image.

    Args:
        masks: give those that the detector finds, which take ``size`` bytes for each object.
        score: leave out what has a lower one.
    """
    height, width = image.shape[1:]
    padded = F.pad(image, (0, -width % multiple, 0, -height % multiple))[None]
    (found,) = ask(padded.contiguous(memory_format=torch.channels_last), [(height, width)])
    found = {name: part[found["scores"] >= score] for name, part in found.items()}
    boxes = found["boxes"] * found["boxes"].new_tensor([size[1] / width, size[0] / height] * 2)
    pasted = paste(found["masks"], boxes, *size) if masks and "masks" in found else None
    return Found(boxes, found["labels"], found["scores"], pasted)


def pad_together(images: list[Tensor], multiple: int) -> Tensor:
    """Put images ``(3, h, w)`` of any sizes into the top left corners of a batch ``(B, 3, H, W)``, the rest 0."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    shape = len(images), 3, height + -height % multiple, width + -width % multiple
    batch = images[0].new_zeros(shape).contiguous(memory_format=torch.channels_last)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def unpack_masks(packed: Tensor, width: int, height: int, whole_width: int) -> Tensor:
    """Unpack masks ``(N, h, ceil(w / 8))`` uint8, eight pixels in a byte, into ``(N, height, whole_width)`` of 0 and 1.

    Args:
        width: w, of the image without its padding.
        height, whole_width: of the batch.
    """
    bits = packed[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device) & 1
    masks = bits.flatten(2)[:, :, :width]
    return F.pad(masks, (0, whole_width - width, 0, height - packed.shape[1]))
