"""Faster and Mask R-CNN: proposals, and heads that look into them. Sources: arXiv 1506.01497, 1703.06870.

torchvision's networks and sampling, with the losses, assignment and RoIAlign of the published CrossFormer detectors.
Inside, class 0 is the background, as in torchvision.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads as theirs
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from .anchors import RATIOS, BestToEach, ExactAnchors
from .boxes import AlignedRoIAlign, BoundedBoxCoder, full_precision, length, mask_targets, mean_over_ranks

ANCHOR_SCALE = 8.0
"""Side of a square anchor, in strides."""
BOX_SIDE, MASK_SIDE, TARGET_SIDE = 7, 14, 28
FC_CHANNELS = 1024
DELTA_WEIGHTS = 10.0, 10.0, 5.0, 5.0
SCORE, NMS, DETECTIONS = 0.05, 0.5, 100
BEFORE_NMS = {"training": 2000, "testing": 1000}
PROPOSALS = {"training": 1000, "testing": 1000}

Targets = list[dict[str, Tensor]]


class Drawn(NamedTuple):
    """Boxes that were drawn for training, image by image.

    Attributes:
        boxes: ``(N_i, 4)``.
        matched: ``(N_i,)`` int64, the object that each is about.
        labels: ``(N_i,)`` int64, 0 for the background.
        deltas: ``(N_i, 4)``, what the difference to the object is.
    """

    boxes: list[Tensor]
    matched: list[Tensor]
    labels: list[Tensor]
    deltas: Sequence[Tensor]


class ProposalHead(RPNHead):
    """torchvision's, in single precision at the end."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Give each level's logits ``(B, anchors, H, W)`` and differences ``(B, 4 anchors, H, W)``."""
        logits, deltas = super().forward(x)
        return [full_precision(each) for each in logits], [full_precision(each) for each in deltas]


class Proposals(RegionProposalNetwork):
    """Proposes where objects may be.

    Args:
        strides: of the levels, in pixels.
        channels: of each level.
        scale: side of a square anchor, in strides.
    """

    def __init__(self, strides: Sequence[int], channels: int, scale: float = ANCHOR_SCALE):
        head = ProposalHead(channels, len(RATIOS))
        super().__init__(
            ExactAnchors(strides, (scale,)), head, 0.7, 0.3, 256, 0.5, BEFORE_NMS, PROPOSALS, nms_thresh=0.7
        )
        self.box_coder = BoundedBoxCoder()
        self.proposal_matcher = BestToEach(0.7, 0.3, least=0.3)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Give cross entropy and L1 loss, both divided by all places that were sampled.

        An image without any of a kind, as one without objects has no positive ones, counts as having one of it.
        """
        drawn = self.fg_bg_sampler(labels)
        positive, negative = (torch.cat(each) for each in drawn)
        found, sampled = torch.where(positive)[0], torch.where(positive | negative)[0]
        by = mean_over_ranks(torch.stack([each.sum().clamp(min=1) for kind in drawn for each in kind]).sum())
        logits, wanted = objectness.flatten()[sampled], torch.cat(labels)[sampled].to(objectness)
        of_classes = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        right = torch.cat(regression_targets)[found].to(pred_bbox_deltas)
        of_boxes = F.l1_loss(pred_bbox_deltas[found], right, reduction="sum")
        return of_classes / by, of_boxes / by


class RoIHeads(theirs.RoIHeads):
    """Looks into proposals: what is there, where exactly, and which pixels it covers.

    Args:
        strides: of the levels that are looked into, in pixels.
        channels: of each level.
        num_classes: classes to find, without the background.
        masks: find pixels too.
        overlap: with an object (IoU), from which a proposal has to find it.
        weights: of the differences between boxes.
        box_head: makes vectors of FC_CHANNELS of the features in boxes; two fully connected layers unless given.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: int,
        num_classes: int,
        masks: bool,
        overlap: float = 0.5,
        weights: tuple[float, float, float, float] = DELTA_WEIGHTS,
        box_head: nn.Module | None = None,
    ):
        of_masks = {}
        if masks:
            of_masks = {
                "mask_roi_pool": AlignedRoIAlign(strides, MASK_SIDE),
                "mask_head": MaskRCNNHeads(channels, (channels,) * 4, 1),
                "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
            }
        super().__init__(
            AlignedRoIAlign(strides, BOX_SIDE),
            box_head or TwoMLPHead(channels * BOX_SIDE**2, FC_CHANNELS),
            FastRCNNPredictor(FC_CHANNELS, num_classes + 1),
            *(overlap, overlap, 512, 0.25, weights, SCORE, NMS, DETECTIONS),
            **of_masks,
        )
        self.box_coder = BoundedBoxCoder(weights)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Give what is found, or in training the losses ``cls``, ``box`` and perhaps ``mask``."""
        if targets is not None:
            return [], self.losses(features, proposals, image_shapes, targets)
        logits, deltas = self.look(features, proposals, image_shapes)
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.has_mask():
            add_masks(results, self.look_for_masks(features, [each["boxes"] for each in results], image_shapes))
        return results, {}

    def look(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Give the logits ``(N, 1 + classes)`` and differences ``(N, 4 (1 + classes))`` of the boxes of all images."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))
        return full_precision(logits), full_precision(deltas)

    def look_for_masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Give the logits of masks ``(N, 1 + classes, 28, 28)`` of the boxes of all images."""
        return full_precision(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))))

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, Tensor]:
        """Give the losses of proposals that are drawn of those given and the objects themselves."""
        drawn = Drawn(*self.select_training_samples(proposals, targets))
        logits, deltas = self.look(features, drawn.boxes, image_shapes)
        return self.losses_of(drawn, logits, deltas, features, image_shapes, targets)

    def losses_of(
        self,
        drawn: Drawn,
        logits: Tensor,
        deltas: Tensor,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, Tensor]:
        """Give the losses of boxes that were drawn; ``logits`` and ``deltas`` are what :meth:`look` says of them."""
        losses = box_losses(logits, deltas, torch.cat(drawn.labels), torch.cat(list(drawn.deltas)))
        if self.has_mask():
            found = [torch.where(each > 0)[0] for each in drawn.labels]
            boxes, matched, labels = (
                [each[i] for each, i in zip(some, found, strict=True)]
                for some in (drawn.boxes, drawn.matched, drawn.labels)
            )
            masks = self.look_for_masks(features, boxes, image_shapes)
            losses["mask"] = mask_loss(masks, boxes, matched, torch.cat(labels), targets)
        return losses


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Give cross entropy and L1 loss, both divided by all boxes that were sampled.

    Args:
        logits: ``(N, 1 + classes)``.
        deltas: ``(N, 4 (1 + classes))``, of which those of the label count.
        labels: ``(N,)`` int64, 0 for the background.
        wanted: ``(N, 4)``.
    """
    by = mean_over_ranks(length(labels))
    found = torch.where(labels > 0)[0]
    of_label = deltas.unflatten(1, (-1, 4))[found, labels[found]]
    return {
        "cls": F.cross_entropy(logits, labels, reduction="sum") / by,
        "box": F.l1_loss(of_label, wanted[found].to(of_label), reduction="sum") / by,
    }


def mask_loss(logits: Tensor, boxes: list[Tensor], matched: list[Tensor], labels: Tensor, targets: Targets) -> Tensor:
    """Give the cross entropy of the masks of the labels ``(N,)``, averaged over their pixels; 0 without any box."""
    wanted = torch.cat(
        [
            mask_targets(target["masks"], inside, whose, TARGET_SIDE)
            for target, inside, whose in zip(targets, boxes, matched, strict=True)
        ]
    )
    of_label = logits[torch.arange(len(labels), device=labels.device), labels]
    by = mean_over_ranks(length(labels)) * TARGET_SIDE**2
    return F.binary_cross_entropy_with_logits(of_label, wanted.to(of_label), reduction="sum") / by


def add_masks(results: list[dict[str, Tensor]], logits: Tensor) -> None:
    """Give each result the probabilities of its masks, ``(N, 28, 28)``, of their labels."""
    apart = logits.split([len(each["labels"]) for each in results])
    for each, masks in zip(results, apart, strict=True):
        at = torch.arange(len(masks), device=masks.device)
        each["masks"] = masks[at, each["labels"]].sigmoid()


def torchvision_rpn(strides: Sequence[int], channels: int, scale: float = ANCHOR_SCALE) -> RegionProposalNetwork:
    """Build torchvision's own region proposal network."""
    anchors = AnchorGenerator(tuple((int(scale * stride),) for stride in strides), (RATIOS,) * len(strides))
    both = {"training": 2000, "testing": 1000}
    return RegionProposalNetwork(anchors, RPNHead(channels, len(RATIOS)), 0.7, 0.3, 256, 0.5, both, both, 0.7)


def torchvision_heads(levels: Sequence[str], channels: int, num_classes: int, masks: bool) -> theirs.RoIHeads:
    """Build torchvision's own heads."""
    of_masks = {}
    if masks:
        of_masks = {
            "mask_roi_pool": MultiScaleRoIAlign(list(levels), MASK_SIDE, 2),
            "mask_head": MaskRCNNHeads(channels, (channels,) * 4, 1),
            "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
        }
    return theirs.RoIHeads(
        MultiScaleRoIAlign(list(levels), BOX_SIDE, 2),
        TwoMLPHead(channels * BOX_SIDE**2, FC_CHANNELS),
        FastRCNNPredictor(FC_CHANNELS, num_classes + 1),
        *(0.5, 0.5, 512, 0.25, None, SCORE, NMS, DETECTIONS),
        **of_masks,
    )
