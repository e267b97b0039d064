"""Cascade R-CNN: heads one after the other, each with better boxes to begin from. Source: arXiv 1712.00726.

No configuration of it was published with CrossFormer. Convolutions with BatchNorm in the heads, boxes for each class
and a mask head for each stage follow from the published number of parameters.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import clip_boxes_to_image

from .rcnn import BOX_SIDE, FC_CHANNELS, Drawn, RoIHeads, Targets, add_masks

OVERLAPS = 0.5, 0.6, 0.7
LOSS_WEIGHTS = 1.0, 0.5, 0.25
DELTA_WEIGHTS: tuple[tuple[float, float, float, float], ...] = (
    (10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)
)  # fmt: skip


class CascadeHeads(nn.Module):
    """Three stages of :class:`.rcnn.RoIHeads`; arguments as there."""

    def __init__(self, strides: Sequence[int], channels: int, num_classes: int, masks: bool):
        super().__init__()
        stages = []
        for overlap, weights in zip(OVERLAPS, DELTA_WEIGHTS, strict=True):
            head = FastRCNNConvFCHead((channels, BOX_SIDE, BOX_SIDE), [channels] * 4, [FC_CHANNELS], nn.BatchNorm2d)
            stages.append(RoIHeads(strides, channels, num_classes, masks, overlap, weights, head))
        self.stages = nn.ModuleList(stages)

    def in_order(self) -> list[RoIHeads]:
        """Give the stages, the first one first."""
        return [cast(RoIHeads, stage) for stage in self.stages]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Give what is found, or in training the losses of each stage, as ``cls1``."""
        if targets is not None:
            return [], self.losses(features, proposals, image_shapes, targets)
        logits, deltas, proposals = self.look(features, proposals, image_shapes)
        last = self.in_order()[-1]
        found = last.postprocess_detections(logits, deltas, proposals, image_shapes)
        results = [dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in zip(*found, strict=True)]
        if last.has_mask():
            add_masks(results, self.look_for_masks(features, [each["boxes"] for each in results], image_shapes))
        return results, {}

    def look(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Give the mean logits of all stages, and the last one's differences and the boxes that they are of."""
        said: list[Tensor] = []
        stages = self.in_order()
        for stage in stages:
            logits, deltas = stage.look(features, proposals, image_shapes)
            said.append(logits)
            if len(said) < len(stages):
                best = [each[:, 1:].argmax(dim=1) + 1 for each in apart(logits, proposals)]
                proposals = refined(stage, proposals, deltas, best, image_shapes)
        return torch.stack(said).mean(dim=0), deltas, proposals

    def look_for_masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Give the logits of the mean masks of all stages."""
        masks = [stage.look_for_masks(features, boxes, image_shapes).sigmoid() for stage in self.in_order()]
        return torch.stack(masks).mean(dim=0).logit()

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets,
    ) -> dict[str, Tensor]:
        """Give the losses of all stages; what one has made of its boxes the next one begins from."""
        losses: dict[str, Tensor] = {}
        for i, (stage, weight) in enumerate(zip(self.in_order(), LOSS_WEIGHTS, strict=True)):
            drawn = Drawn(*stage.select_training_samples(proposals, targets))
            logits, deltas = stage.look(features, drawn.boxes, image_shapes)
            terms = stage.losses_of(drawn, logits, deltas, features, image_shapes, targets)
            losses |= {f"{name}{i + 1}": weight * term for name, term in terms.items()}
            likely = [each[:, 1:].argmax(dim=1) + 1 for each in apart(logits, drawn.boxes)]
            of_class = [torch.where(own > 0, own, other) for own, other in zip(drawn.labels, likely, strict=True)]
            proposals = refined(stage, drawn.boxes, deltas, of_class, image_shapes)
            proposals = [
                after[~is_object(before, target["boxes"])]
                for after, before, target in zip(proposals, drawn.boxes, targets, strict=True)
            ]
        return losses


def apart(values: Tensor, boxes: list[Tensor]) -> tuple[Tensor, ...]:
    """Split what is said of the boxes of all images by image."""
    return values.split([len(each) for each in boxes])


def refined(
    stage: RoIHeads, boxes: list[Tensor], deltas: Tensor, labels: list[Tensor], image_shapes: list[tuple[int, int]]
) -> list[Tensor]:
    """Move each image's boxes ``(N_i, 4)`` by the differences of their labels, within the image; without gradient."""
    result = []
    for of_boxes, of_deltas, of_labels, shape in zip(boxes, apart(deltas, boxes), labels, image_shapes, strict=True):
        each = torch.arange(len(of_labels), device=of_labels.device)
        chosen = of_deltas.detach().unflatten(1, (-1, 4))[each, of_labels]
        moved = stage.box_coder.decode_single(chosen, of_boxes).nan_to_num()  # RoIAlign fails on what is not finite
        result.append(clip_boxes_to_image(moved, shape))
    return result


def is_object(boxes: Tensor, objects: Tensor) -> Tensor:
    """Tell which boxes ``(N, 4)`` are the very ones of objects, which every stage gets anew."""
    return (boxes[:, None] == objects.to(boxes)).all(dim=2).any(dim=1)
