"""A backbone and a head that tells the class of each place of an image."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .layers import resize, size_of
from .semantic_fpn import FPN, PYRAMID_CHANNELS, SemanticFPNHead
from .upernet import CHANNELS, FCNHead, UPerNetHead

HEADS = "semantic_fpn", "upernet"
LEVELS = 4
"""Maps that a head takes."""
AUXILIARY_LEVEL = 2


class Segmenter(nn.Module):
    """Semantic segmentation: images to logits, a quarter of the image's height and width with most backbones.

    Args:
        backbone: a model of timm's without its classifier (``num_classes=0``) that has ``forward_intermediates``.
        head: ``semantic_fpn``, or ``upernet`` with its auxiliary head.
        num_classes: classes to tell apart.
        drop_rate: dropout of whole channels before the last convolution.
        head_channels: inside of the head; 0 for the published number.

    Attributes:
        removed: state-dict keys that the backbone had and has no more.

    Raises:
        ValueError: there is no such head, or the backbone gives no maps; the message starts with the argument's name.
    """

    def __init__(self, backbone: Any, head: str, num_classes: int, drop_rate: float = 0.1, head_channels: int = 0):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head {head!r} is not one of {', '.join(HEADS)}")
        if not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"backbone {type(backbone).__name__} gives no maps of several sizes")
        self.num_classes = num_classes
        self.indices = choose_maps([info["reduction"] for info in backbone.feature_info])
        maps = [backbone.feature_info[i] for i in self.indices]
        channels, reductions = [info["num_chs"] for info in maps], [info["reduction"] for info in maps]
        self.pretrained_cfg = {
            **backbone.pretrained_cfg,
            "classifier": ("decode_head.conv_seg", "auxiliary_head.conv_seg")[: 1 + (head == "upernet")],
        }
        before = set(backbone.state_dict())
        remove_what_follows(backbone, self.indices)
        self.removed = before - backbone.state_dict().keys()
        self.backbone = backbone
        if head == "semantic_fpn":
            wide = head_channels or PYRAMID_CHANNELS
            self.neck = FPN(channels, wide)
            self.decode_head: nn.Module = SemanticFPNHead(reductions, num_classes, drop_rate, wide, max(1, wide // 2))
        else:
            wide = head_channels or CHANNELS
            self.decode_head = UPerNetHead(channels, num_classes, drop_rate, wide)
            self.auxiliary_head = FCNHead(channels[AUXILIARY_LEVEL], num_classes, drop_rate, max(1, wide // 2))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Give the backbone's maps of images ``(B, 3, H, W)``, each ``(B, C_i, H_i, W_i)``."""
        return self.backbone.forward_intermediates(
            images, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )

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

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        """All that is not the backbone."""
        return tuple(module for name, module in self.named_children() if name != "backbone")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, **how) -> None:
        """Recompute the backbone's blocks in the backward pass, as its own method does."""
        self.backbone.set_grad_checkpointing(enable, **how)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What the backbone exempts from weight decay."""
        exempt = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in exempt}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """How the backbone's parameters fall into layers; the heads are the last."""

        def below(pattern):
            if isinstance(pattern, str):
                return pattern.replace("^", r"^backbone\.", 1)
            if isinstance(pattern, Sequence):
                kind: Any = type(pattern)
                return kind(below(part) for part in pattern)
            return pattern

        return {name: below(pattern) for name, pattern in self.backbone.group_matcher(coarse=coarse).items()}


class AtImageSize(nn.Module):
    """A segmenter whose logits have the size of the image, as an export gives them."""

    def __init__(self, segmenter: nn.Module):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        """Turn images ``(B, 3, H, W)`` into logits ``(B, classes, H, W)``."""
        return resize(self.segmenter(images), size_of(images))


def remove_what_follows(backbone: Any, indices: list[int]) -> None:
    """Remove what a model of timm's does not need for these maps; DDP would wait for its gradients."""
    backbone.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    classifier = backbone.pretrained_cfg["classifier"]
    head = (classifier if isinstance(classifier, str) else classifier[0]).partition(".")[0]
    if any(True for _ in getattr(backbone, head).parameters()):  # norms and layers before the classifier itself
        setattr(backbone, head, nn.Identity())


def choose_maps(reductions: Sequence[int]) -> list[int]:
    """Choose LEVELS maps of a backbone: the coarsest of several sizes, or evenly spaced ones where all are alike."""
    sizes = {reduction: i for i, reduction in enumerate(reductions)}
    if len(sizes) >= LEVELS:
        return [*sizes.values()][-LEVELS:]
    if len(sizes) == 1 and len(reductions) >= LEVELS:
        return [len(reductions) * (level + 1) // LEVELS - 1 for level in range(LEVELS)]
    raise ValueError(f"backbone gives maps of {len(sizes)} sizes, of which a head takes {LEVELS}")


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
    if isinstance(backbone, str):
        backbone = timm.create_model(backbone, num_classes=0, **kwargs)
    elif kwargs:
        raise ValueError(f"{next(iter(kwargs))} is for a backbone that is built here, not for one that is given")
    return Segmenter(backbone, head, num_classes, drop_rate, head_channels)
