"""A detector whose answers have fixed sizes, so that its whole computation is one graph: for exports."""

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, nms

from .boxes import AlignedRoIAlign
from .cascade import CascadeHeads
from .detector import Detector
from .layers import size_of
from .rcnn import Proposals, RoIHeads

CANDIDATES = 10_000
"""Of all classes and boxes so many go into non-maximum suppression at most, those with the highest scores."""


ALIKE = 1e-4
"""So near to each other two scores are alike."""


class FixedDetector(nn.Module):
    """Finds the objects in one image, as the detector does, non-maximum suppression included.

    Args:
        detector: as published; it is changed, so that it computes features within boxes on every level.

    Raises:
        ValueError: it has torchvision's heads.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        if not detector.published:
            raise ValueError("style torchvision cannot be exported; only published can")
        for module in detector.modules():
            if isinstance(module, AlignedRoIAlign):
                module.on_every_level = True
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Find the objects in an image ``(1, 3, H, W)``.

        Returns:
            ``boxes`` ``(100, 4)``, ``scores`` ``(100,)``, the highest first, ``labels`` ``(100,)``, perhaps ``masks``
            ``(100, 28, 28)``. Low scores are not left out; where fewer are found the last ones have a score of 0.
        """
        levels, size = self.detector.levels(images), size_of(images)
        if hasattr(self.detector, "retinanet"):
            return self.of_one_stage(images, levels, size)
        features = {str(level): each for level, each in enumerate(levels)}
        proposals = self.propose(images, levels, size)
        heads = self.detector.roi_heads
        if isinstance(heads, CascadeHeads):
            logits, deltas, (proposals,) = heads.look(features, [proposals], [size])
            last = heads.in_order()[-1]
        else:
            last = cast(RoIHeads, heads)
            logits, deltas = last.look(features, [proposals], [size])
        boxes = last.box_coder.decode_single(deltas, proposals).unflatten(1, (-1, 4))[:, 1:]
        boxes = clip_boxes_to_image(boxes.flatten(0, 1), size)
        # A proposal of no extent only fills up
        real = ((proposals[:, 2:] - proposals[:, :2]) > 0).all(dim=1, keepdim=True)
        scores = (logits.softmax(dim=1)[:, 1:] * real).flatten()
        labels = torch.arange(self.detector.num_classes, device=images.device).expand(len(proposals), -1).flatten()
        scores = where_wide(boxes, scores, 1e-2)
        found = highest(boxes, scores, labels, CANDIDATES)
        boxes, scores, labels = suppressed(*found, last.nms_thresh, last.detections_per_img)
        if not last.has_mask():
            return boxes, scores, labels
        masks = heads.look_for_masks(features, [boxes], [size])  # type: ignore[operator]
        return boxes, scores, labels, masks[torch.arange(len(labels), device=labels.device), labels + 1].sigmoid()

    def of_one_stage(self, images: Tensor, levels: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Answer as a RetinaNet."""
        heads = self.detector.retinanet
        outputs = heads.head(levels)
        counts, anchors = self.anchors(heads.anchor_generator, levels)
        found = []
        for logits, deltas, places in zip(
            outputs["cls_logits"][0].split(counts), outputs["bbox_regression"][0].split(counts), anchors, strict=True
        ):
            scores, at = logits.sigmoid().flatten().topk(min(heads.topk_candidates, logits.numel()))
            place = at // logits.shape[1]
            boxes = clip_boxes_to_image(heads.box_coder.decode_single(deltas[place], places[place]), size)
            found.append((boxes, scores, at % logits.shape[1]))
        boxes, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return suppressed(boxes, scores, labels, heads.nms_thresh, heads.detections_per_img)

    def propose(self, images: Tensor, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Propose boxes, ``(1000, 4)``; those that only fill up have no extent."""
        rpn = cast(Proposals, self.detector.rpn)
        _, anchors = self.anchors(rpn.anchor_generator, levels)
        found = []
        for number, (logits, deltas, places) in enumerate(zip(*rpn.head(levels), anchors, strict=True)):
            scores, at = logits[0].permute(1, 2, 0).flatten().topk(min(rpn.pre_nms_top_n(), len(places)))
            deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            boxes = clip_boxes_to_image(rpn.box_coder.decode_single(deltas[at], places[at]), size)
            scores = where_wide(boxes, scores.sigmoid(), rpn.min_size)
            found.append((boxes, scores, torch.full_like(at, number)))
        boxes, scores, of_level = (torch.cat(part) for part in zip(*found, strict=True))
        return suppressed(boxes, scores, of_level, rpn.nms_thresh, rpn.post_nms_top_n())[0]

    @staticmethod
    def anchors(generator, levels: list[Tensor]) -> tuple[list[int], list[Tensor]]:
        """Give each level's number of anchors, and these, ``(n, 4)``."""
        generator.set_cell_anchors(torch.float32, levels[0].device)
        sizes = [list(size_of(each)) for each in levels]
        anchors = generator.grid_anchors(sizes, [[stride, stride] for stride in generator.strides])
        return [len(each) for each in anchors], anchors


def where_wide(boxes: Tensor, scores: Tensor, least: float) -> Tensor:
    """Set the scores of boxes that have hardly any width or height to 0."""
    return torch.where(((boxes[:, 2:] - boxes[:, :2]) >= least).all(dim=1), scores, 0.0)


def largest_differences(found: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[float, float]:
    """Compare two answers: the largest difference of a score, and of a side of a box, in pixels.

    Where scores are so alike that their order is a matter of rounding, boxes are compared in any order.
    """
    boxes, scores, labels, *_ = found
    apart = (boxes[:, None] - other[0]).abs().amax(dim=2)
    comparable = (labels[:, None] == other[2]) & ((scores[:, None] - other[1]).abs() <= ALIKE)
    nearest = torch.where(comparable, apart, torch.inf).amin(dim=1)
    counts = (scores > 0) & (scores > scores.min() + ALIKE)  # the last ones may have made way for others
    return (scores - other[1]).abs().max().item(), nearest[counts].max().item() if counts.any() else 0.0


def highest(boxes: Tensor, scores: Tensor, kinds: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep so many boxes with the highest scores."""
    scores, at = scores.topk(min(count, len(scores)))
    return boxes[at], scores, kinds[at]


def suppressed(
    boxes: Tensor, scores: Tensor, kinds: Tensor, threshold: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress boxes that overlap with a higher one of their kind, and keep so many, filled up with 0."""
    apart = kinds[:, None] * (boxes.max() + 1)
    keep = nms(boxes + apart, scores, threshold)
    nothing = keep.new_full((count,), len(boxes))
    keep = torch.cat([keep, nothing])[:count]
    boxes, scores, kinds = (torch.cat([part, part.new_zeros(1, *part.shape[1:])]) for part in (boxes, scores, kinds))
    real = scores[keep] > 0
    return boxes[keep] * real[:, None], scores[keep], kinds[keep] * real
