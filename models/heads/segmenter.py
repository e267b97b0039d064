"""A backbone and a head that tells the class of each place of an image."""

from typing import Any

from torch import Tensor, nn

from .fpn import FPN, PYRAMID_CHANNELS
from .layers import resize, size_of
from .on_maps import OnMaps, a_backbone
from .semantic_fpn import SemanticFPNHead
from .upernet import CHANNELS, FCNHead, UPerNetHead

HEADS = "semantic_fpn", "upernet"
AUXILIARY_LEVEL = 2


class Segmenter(OnMaps):
    """Semantic segmentation: images to logits, a quarter of the image's height and width with most backbones.

    Args:
        backbone: as for :class:`.on_maps.OnMaps`.
        head: ``semantic_fpn``, or ``upernet`` with its auxiliary head.
        num_classes: classes to tell apart.
        drop_rate: dropout of whole channels before the last convolution.
        head_channels: inside of the head; 0 for the published number.

    Raises:
        ValueError: there is no such head, or the backbone gives no maps; the message starts with the argument's name.
    """

    def __init__(self, backbone: Any, head: str, num_classes: int, drop_rate: float = 0.1, head_channels: int = 0):
        if head not in HEADS:
            raise ValueError(f"head {head!r} is not one of {', '.join(HEADS)}")
        last_layers = "decode_head.conv_seg", "auxiliary_head.conv_seg"
        super().__init__(backbone, num_classes, last_layers[: 1 + (head == "upernet")])
        channels = self.channels
        if head == "semantic_fpn":
            wide = head_channels or PYRAMID_CHANNELS
            self.neck = FPN(channels, wide)
            self.decode_head: nn.Module = SemanticFPNHead(
                self.reductions, num_classes, drop_rate, wide, max(1, wide // 2)
            )
        else:
            wide = head_channels or CHANNELS
            self.decode_head = UPerNetHead(channels, num_classes, drop_rate, wide)
            self.auxiliary_head = FCNHead(channels[AUXILIARY_LEVEL], num_classes, drop_rate, max(1, wide // 2))

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """Turn images ``(B, 3, H, W)`` into logits ``(B, classes, h, w)`` at the size of the first map.

        In training mode the logits of each head by its name, ``decode`` and perhaps ``aux``.
        """
        maps = self.maps(images)
        logits = self.decode_head(self.neck(maps) if hasattr(self, "neck") else maps)
        if not self.training:
            return logits
        if not hasattr(self, "auxiliary_head"):
            return {"decode": logits}
        return {"decode": logits, "aux": self.auxiliary_head(maps[AUXILIARY_LEVEL])}


class AtImageSize(nn.Module):
    """A segmenter whose logits have the size of the image, as an export gives them."""

    def __init__(self, segmenter: nn.Module):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        """Turn images ``(B, 3, H, W)`` into logits ``(B, classes, H, W)``."""
        return resize(self.segmenter(images), size_of(images))


def create_segmenter(
    head: str, backbone: str | nn.Module, num_classes: int, drop_rate: float = 0.1, head_channels: int = 0, **kwargs
) -> Segmenter:
    """Build a network for semantic segmentation on any backbone of timm's that gives maps.

    Args:
        head: ``semantic_fpn`` or ``upernet``.
        backbone: a name that timm knows, or a model of timm's; what is not needed of it is removed.
        num_classes: classes to tell apart.
        drop_rate: dropout in the head.
        head_channels: inside of the head; 0 for the published number.
        kwargs: what ``timm.create_model`` takes for the backbone besides.

    Raises:
        ValueError: there is no such head, or the backbone gives no maps.
    """
    return Segmenter(a_backbone(backbone, **kwargs), head, num_classes, drop_rate, head_channels)
