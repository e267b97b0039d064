"""A backbone, a pyramid and heads that find objects: their boxes, classes and perhaps pixels."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from .cascade import CascadeHeads
from .fpn import FPN, PYRAMID_CHANNELS
from .layers import size_of
from .on_maps import OnMaps, a_backbone
from .rcnn import Proposals, RoIHeads, torchvision_heads, torchvision_rpn
from .retinanet import RetinaHead

DETECTORS = "retinanet", "mask_rcnn", "cascade_mask_rcnn"
STYLES = "published", "torchvision"
TERMS = {
    "loss_objectness": "rpn_cls", "loss_rpn_box_reg": "rpn_box", "loss_classifier": "cls", "loss_box_reg": "box",
    "loss_mask": "mask",
}  # fmt: skip
"""What torchvision calls the losses, and what they are called here."""
Found = dict[str, Tensor]


class Detector(OnMaps):
    """Object detection and instance segmentation.

    Args:
        backbone: as for :class:`.on_maps.OnMaps`; its maps are of several sizes.
        head: ``retinanet``, ``mask_rcnn`` or ``cascade_mask_rcnn``.
        num_classes: classes to find.
        masks: find each object's pixels too; of ``retinanet`` it is without meaning.
        style: anchors, assignment and losses as ``published`` with CrossFormer, or those of ``torchvision``.
        head_channels: of the pyramid; 0 for the published number.
        anchor_scale: side of the smallest square anchors in strides of the map; 0 for the published number.

    Raises:
        ValueError: there is no such head or style, or the backbone gives no maps of several sizes; the message starts
            with the argument's name.
    """

    def __init__(
        self,
        backbone: Any,
        head: str,
        num_classes: int,
        masks: bool = True,
        style: str = "published",
        head_channels: int = 0,
        anchor_scale: float = 0.0,
    ):
        if head not in DETECTORS:
            raise ValueError(f"head {head!r} is not one of {', '.join(DETECTORS)}")
        if style not in STYLES or (head == "cascade_mask_rcnn" and style != "published"):
            raise ValueError(f"style {style!r} is not one of {head}'s")
        super().__init__(backbone, num_classes, last_layers(head, masks))
        if len(set(self.reductions)) < len(self.reductions):
            raise ValueError("backbone gives maps of one size only, and a pyramid takes several")
        channels, published = head_channels or PYRAMID_CHANNELS, style == "published"
        scale = (anchor_scale,) if anchor_scale else ()
        self.published = published
        self.finds_masks = masks and head != "retinanet"
        if head == "retinanet":
            *_, last = self.reductions
            strides = [*self.reductions[1:], 2 * last, 4 * last]
            self.neck = FPN(self.channels[1:], channels, extra=2, relu=not published)
            self.retinanet = RetinaHead(strides, channels, num_classes, published, *scale)
            return
        self.neck = FPN(self.channels, channels)
        strides = [*self.reductions, 2 * self.reductions[-1]]
        self.rpn = (Proposals if published else torchvision_rpn)(strides, channels, *scale)
        if head == "cascade_mask_rcnn":
            self.roi_heads: nn.Module = CascadeHeads(self.reductions, channels, num_classes, masks)
        elif published:
            self.roi_heads = RoIHeads(self.reductions, channels, num_classes, masks)
        else:
            names = [str(level) for level in range(len(self.reductions))]
            self.roi_heads = torchvision_heads(names, channels, num_classes, masks)

    def classes_of(self, outputs: int) -> int:
        """Tell how many classes so many outputs of the first of the last layers are for."""
        if hasattr(self, "retinanet"):
            return outputs // self.retinanet.anchor_generator.num_anchors_per_location()[0]
        return outputs - 1

    def levels(self, images: Tensor) -> list[Tensor]:
        """Give the pyramid of images ``(B, 3, H, W)``, each level ``(B, channels, H_l, W_l)``."""
        maps = self.maps(images)
        if hasattr(self, "retinanet"):
            return self.neck(maps[1:])
        levels = self.neck(maps)
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]] | None = None, targets: list[Found] | None = None
    ) -> list[Found] | dict[str, Tensor]:
        """Find the objects in images ``(B, 3, H, W)``; in training mode give the named terms of the loss instead.

        Args:
            sizes: height and width of each image without its padding; everything unless given.
            targets: of each image ``boxes`` ``(N, 4)`` as left, top, right, bottom in pixels, ``labels`` ``(N,)`` int64
                and perhaps ``masks`` ``(N, H, W)`` of 0 and 1. Only training takes them.

        Returns:
            of each image ``boxes``, ``labels``, ``scores`` ``(N,)``, the highest score first, and perhaps ``masks``
            ``(N, 28, 28)``, which are probabilities within the boxes; see :func:`.boxes.paste`.
        """
        batch = ImageList(images, sizes or [size_of(images)] * len(images))
        levels = self.levels(images)
        if self.training and targets is None:
            raise ValueError("targets are needed in training mode")
        targets = targets if self.training else None
        if hasattr(self, "retinanet"):
            found, losses = self.retinanet(batch, levels, targets)
            return losses if self.training else found
        # Inside of the heads 0 is the background
        targets = targets and [target | {"labels": target["labels"] + 1} for target in targets]
        features = {str(level): each for level, each in enumerate(levels)}
        proposals, of_proposals = self.rpn(batch, features, targets)
        found, losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return {TERMS.get(name, name): term for name, term in (of_proposals | losses).items()}
        for each in found:
            each["labels"] = each["labels"] - 1
            if "masks" in each:
                each["masks"] = each["masks"].flatten(1).unflatten(1, (28, 28))
        return found


def last_layers(head: str, masks: bool) -> list[str]:
    """Name the modules of a detector whose size depends on the number of classes."""
    if head == "retinanet":
        return ["retinanet.head.classification_head.cls_logits"]
    stages = ["roi_heads"] if head == "mask_rcnn" else [f"roi_heads.stages.{i}" for i in range(3)]
    names = ["box_predictor.cls_score", "box_predictor.bbox_pred"]
    names += ["mask_predictor.mask_fcn_logits"] if masks else []
    return [f"{stage}.{name}" for stage in stages for name in names]


def create_detector(
    head: str,
    backbone: str | nn.Module,
    num_classes: int,
    masks: bool = True,
    style: str = "published",
    head_channels: int = 0,
    anchor_scale: float = 0.0,
    **kwargs,
) -> Detector:
    """Build a network for object detection on any backbone of timm's that gives maps of several sizes.

    Args:
        head: ``retinanet``, ``mask_rcnn`` or ``cascade_mask_rcnn``.
        backbone: a name that timm knows, or a model of timm's; what is not needed of it is removed.
        num_classes: classes to find.
        masks: find each object's pixels too.
        style: ``published`` with CrossFormer, or ``torchvision``.
        head_channels: of the pyramid; 0 for the published number.
        anchor_scale: side of the smallest square anchors in strides of the map; 0 for the published number.
        kwargs: what ``timm.create_model`` takes for the backbone besides.

    Raises:
        ValueError: there is no such head or style, or the backbone gives no maps of several sizes.
    """
    return Detector(a_backbone(backbone, **kwargs), head, num_classes, masks, style, head_channels, anchor_scale)
