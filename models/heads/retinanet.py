"""RetinaNet: a dense detector of one stage. Source: Lin et al., arXiv 1708.02002.

torchvision's head, anchors and evaluation, with the losses of the published CrossFormer detectors: divided by what is
positive in the whole batch, not image by image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops import box_iou, sigmoid_focal_loss

from .anchors import BestToEach, ExactAnchors
from .boxes import BoundedBoxCoder, full_precision, mean_over_ranks

ANCHOR_SCALE = 4.0
"""Side of the smallest square anchor, in strides."""
STEPS = 1.0, 2 ** (1 / 3), 2 ** (2 / 3)
"""What the sides of the others are in terms of it."""
DETECTIONS = 100
"""At most so many in an image."""


class RetinaHead(RetinaNet):
    """Finds objects at each place of a pyramid.

    Args:
        strides: of the levels, in pixels.
        channels: of each level.
        num_classes: classes to find.
        published: compute what was published with CrossFormer; else what torchvision does.
        scale: side of the smallest square anchor, in strides.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: int,
        num_classes: int,
        published: bool = True,
        scale: float = ANCHOR_SCALE,
    ):
        body = nn.Identity()
        body.out_channels = channels  # type: ignore[assignment]
        anchors: AnchorGenerator
        if published:
            anchors = ExactAnchors(strides, [scale * step for step in STEPS])
        else:
            sizes = tuple(tuple(int(stride * scale * step) for step in STEPS) for stride in strides)
            anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        counts = {"detections_per_img": DETECTIONS, "proposal_matcher": BestToEach(0.5, 0.4)} if published else {}
        super().__init__(body, num_classes, anchor_generator=anchors, **counts)
        del self.backbone, self.transform  # they are a detector's own
        self.published = published
        if published:
            self.box_coder: BoxCoder = BoundedBoxCoder()
            self.head.regression_head.box_coder = self.box_coder

    def forward(
        self, images: ImageList, levels: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Give what is found, or in training the losses ``cls`` and ``box``; see :class:`.detector.Detector`."""
        outputs = {name: full_precision(value) for name, value in self.head(levels).items()}
        anchors = self.anchor_generator(images, levels)
        if targets is not None:
            losses = self.compute_loss(targets, outputs, anchors)
            return [], {"cls": losses["classification"], "box": losses["bbox_regression"]}
        locations = self.anchor_generator.num_anchors_per_location()
        counts = [each.shape[-2] * each.shape[-1] * n for each, n in zip(levels, locations, strict=True)]
        apart = {name: list(value.split(counts, dim=1)) for name, value in outputs.items()}
        return self.postprocess_detections(
            apart, [list(each.split(counts)) for each in anchors], images.image_sizes
        ), {}

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """Give focal and L1 loss, both divided by the positives of the batch; an image without any counts as one."""
        if not self.published:
            return super().compute_loss(targets, head_outputs, anchors)
        of_classes, of_boxes, positives = [], [], []
        for target, logits, deltas, places in zip(
            targets, head_outputs["cls_logits"], head_outputs["bbox_regression"], anchors, strict=True
        ):
            matched = match(self.proposal_matcher, target["boxes"], places)
            found, counts = torch.where(matched >= 0)[0], matched != Matcher.BETWEEN_THRESHOLDS
            objects = matched[found]
            wanted = torch.zeros_like(logits)
            wanted[found, target["labels"][objects]] = 1.0
            of_classes.append(sigmoid_focal_loss(logits[counts], wanted[counts], reduction="sum"))
            right = self.box_coder.encode_single(target["boxes"][objects].to(places), places[found])
            of_boxes.append(F.l1_loss(deltas[found], right, reduction="sum"))
            positives.append((matched >= 0).sum().clamp(min=1))
        by = mean_over_ranks(torch.stack(positives).sum())
        return {
            "classification": torch.stack(of_classes).sum() / by,
            "bbox_regression": torch.stack(of_boxes).sum() / by,
        }


def match(matcher: Matcher, objects: Tensor, places: Tensor) -> Tensor:
    """Give each place ``(N, 4)`` its object ``(objects, 4)`` by number, ``(N,)``: -1 is none, -2 is left out."""
    if not len(objects):
        return torch.full((len(places),), Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64, device=places.device)
    return matcher(box_iou(objects.to(places), places))
