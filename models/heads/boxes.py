"""Boxes as differences to others, features and masks within boxes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

from utils.distributed import sum_over_ranks, world_size

MASKS_AT_ONCE = 32
"""Whole masks are bytes; as fractions, which RoIAlign takes, so many are in memory."""
SMALLEST_RATIO = 16 / 1000
"""Of a side to that of the box that it is predicted from; and the other way round the largest."""


class BoundedBoxCoder(BoxCoder):
    """Boxes as differences to others; what is predicted grows and shrinks a side by the same factor at most.

    Args:
        weights: what the differences in x, y, width and height are multiplied by.
    """

    def __init__(self, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)):
        super().__init__(weights, bbox_xform_clip=-math.log(SMALLEST_RATIO))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Give the boxes ``(N, 4 K)`` that differ from ``boxes`` ``(N, 4)`` by ``rel_codes`` ``(N, 4 K)``."""
        *centre, width, height = rel_codes.unflatten(1, (-1, 4)).unbind(dim=-1)
        least = [weight * math.log(SMALLEST_RATIO) for weight in self.weights[2:]]
        bounded = torch.stack([*centre, width.clamp(min=least[0]), height.clamp(min=least[1])], dim=-1)
        return super().decode_single(bounded.flatten(1), boxes)


class AlignedRoIAlign(nn.Module):
    """Features within boxes, each taken from the level that fits its size; pixels are squares, not points.

    It samples as often as there are places of the map in a cell. Sources: arXiv 1703.06870, and 1612.03144 for levels.

    Args:
        strides: of the levels, in pixels of the image.
        side: of the result.

    Attributes:
        on_every_level: compute each box on every level and choose then, which takes longer but has a fixed shape.
    """

    def __init__(self, strides: Sequence[int], side: int):
        super().__init__()
        self.strides, self.side = tuple(strides), side
        self.on_every_level = False

    def levels(self, boxes: Tensor) -> Tensor:
        """Tell each box's level, ``(N,)`` int64: one more for each time that it is twice as large as 14 places."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        finest = 14 * self.strides[0]
        return (sides / finest + 1e-6).log2().floor().clamp(0, len(self.strides) - 1).long()

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """Give the features ``(N, C, side, side)`` within the boxes ``(N_i, 4)`` of each image.

        Args:
            x: the levels ``(B, C, H_l, W_l)`` by name, the finest first; those beyond the strides are not used.
            image_shapes: not needed, but what torchvision's has.
        """
        of_image = [each.new_full((len(each), 1), i) for i, each in enumerate(boxes)]
        rois = torch.cat([torch.cat(of_image), torch.cat(boxes)], dim=1)
        levels, maps = self.levels(rois[:, 1:]), list(x.values())
        if self.on_every_level:
            seen = [
                roi_align(each, rois.to(each.dtype), self.side, 1 / stride, aligned=True)
                for each, stride in zip(maps, self.strides, strict=False)
            ]
            return torch.stack(seen)[levels, torch.arange(len(rois), device=rois.device)]
        found = maps[0].new_zeros(len(rois), maps[0].shape[1], self.side, self.side)
        for level, stride in enumerate(self.strides):
            at = torch.where(levels == level)[0]
            seen = roi_align(maps[level], rois[at].to(maps[level].dtype), self.side, 1 / stride, aligned=True)
            found = found.index_put((at,), seen.to(found.dtype))
        return found


def full_precision(x: Tensor) -> Tensor:
    """Give ``x`` in single precision at least: what low precision adds up to is too coarse for boxes and losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over_ranks(count: Tensor) -> Tensor:
    """Give the mean of a count over all ranks, at least 1: then the ranks' mean loss is that of all their images."""
    return (sum_over_ranks(count.to(torch.float32, copy=True)) / world_size()).clamp(min=1)


def length(x: Tensor) -> Tensor:
    """Give the length of a tensor as one on its device, which is not waited for."""
    return torch.full((), len(x), device=x.device)


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """Cut each box's mask out at ``side x side``, 0 or 1, ``(N, side, side)``.

    Args:
        masks: of the objects of an image, ``(objects, H, W)``.
        boxes: ``(N, 4)``.
        matched: ``(N,)`` int64, whose mask each box is to show.
    """
    targets = boxes.new_zeros(len(boxes), side, side)
    for first in range(0, len(masks), MASKS_AT_ONCE):
        some = masks[first : first + MASKS_AT_ONCE, None].to(boxes.dtype)
        at = torch.where((matched >= first) & (matched < first + len(some)))[0]
        rois = torch.cat([(matched[at, None] - first).to(boxes), boxes[at]], dim=1)
        targets[at] = (roi_align(some, rois, side, 1.0, aligned=True)[:, 0] >= 0.5).to(boxes.dtype)
    return targets


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Put masks where their boxes are, ``(N, height, width)`` bool.

    Args:
        masks: probabilities ``(N, side, side)``, which are interpolated at the centres of pixels; half of it is in.
        boxes: ``(N, 4)`` in pixels of the result.
    """
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for out, mask, box, sides in zip(result, masks, boxes, boxes.tolist(), strict=True):
        left, top, right, bottom = sides
        columns = slice(max(0, math.floor(left) - 1), max(0, min(width, math.ceil(right) + 1)))
        rows = slice(max(0, math.floor(top) - 1), max(0, min(height, math.ceil(bottom) + 1)))
        x = torch.arange(columns.start, columns.stop, device=masks.device, dtype=masks.dtype)
        y = torch.arange(rows.start, rows.stop, device=masks.device, dtype=masks.dtype)
        if not (len(x) and len(y) and right > left and bottom > top):
            continue
        x, y = (2 * (x + 0.5 - box[0]) / (box[2] - box[0]) - 1, 2 * (y + 0.5 - box[1]) / (box[3] - box[1]) - 1)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
        out[rows, columns] = nn.functional.grid_sample(mask[None, None], grid, align_corners=False)[0, 0] >= 0.5
    return result
