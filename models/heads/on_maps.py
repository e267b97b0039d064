"""What segmenters and detectors have in common: a backbone of timm's that gives maps of several sizes."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

LEVELS = 4
"""Maps that a head takes."""


class OnMaps(nn.Module):
    """A backbone whose maps a head takes.

    Args:
        backbone: a model of timm's without its classifier (``num_classes=0``) that has ``forward_intermediates``.
        num_classes: classes to tell apart.
        last_layers: names of the modules whose size depends on the number of classes.

    Attributes:
        channels, reductions: of the maps: how many, and how much smaller than the image they are.
        removed: state-dict keys that the backbone had and has no more.

    Raises:
        ValueError: the backbone gives no maps; the message starts with the argument's name.
    """

    def __init__(self, backbone: Any, num_classes: int, last_layers: Sequence[str]):
        super().__init__()
        if not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"backbone {type(backbone).__name__} gives no maps of several sizes")
        self.num_classes = num_classes
        self.indices = choose_maps([info["reduction"] for info in backbone.feature_info])
        maps = [backbone.feature_info[i] for i in self.indices]
        self.channels, self.reductions = [info["num_chs"] for info in maps], [info["reduction"] for info in maps]
        self.pretrained_cfg = {**backbone.pretrained_cfg, "classifier": tuple(last_layers)}
        before = set(backbone.state_dict())
        remove_what_follows(backbone, self.indices)
        self.removed = before - backbone.state_dict().keys()
        self.backbone = backbone

    def maps(self, images: Tensor) -> list[Tensor]:
        """Give the backbone's maps of images ``(B, 3, H, W)``, each ``(B, C_i, H_i, W_i)``."""
        return self.backbone.forward_intermediates(
            images, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )

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


def a_backbone(backbone: str | nn.Module, **kwargs) -> nn.Module:
    """Give a model of timm's without its classifier, by its name and with ``kwargs``; or the one that is given.

    Raises:
        ValueError: there are arguments for one that is given.
    """
    if isinstance(backbone, str):
        return timm.create_model(backbone, num_classes=0, **kwargs)
    if kwargs:
        raise ValueError(f"{next(iter(kwargs))} is for a backbone that is built here, not for one that is given")
    return backbone
