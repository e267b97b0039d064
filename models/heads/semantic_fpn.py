"""Semantic FPN: a feature pyramid whose levels are all brought to the largest map and added.

Source: Kirillov et al., arXiv 1901.02446, section 3. State-dict keys are those of published files: ``decode_head.``.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .fpn import PYRAMID_CHANNELS
from .layers import classifier, conv_norm, resize, size_of

HEAD_CHANNELS = 128


class SemanticFPNHead(nn.Module):
    """Adds the levels of a pyramid up at the size of the first, and tells each place's class.

    Args:
        reductions: how much smaller than the image each level is.
        num_classes: classes to tell apart.
        drop_rate: dropout of whole channels before the last convolution.
        in_channels: of each level.
        channels: of their sum.
    """

    def __init__(
        self,
        reductions: Sequence[int],
        num_classes: int,
        drop_rate: float = 0.1,
        in_channels: int = PYRAMID_CHANNELS,
        channels: int = HEAD_CHANNELS,
    ):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for reduction in reductions:
            doublings = round(math.log2(reduction / reductions[0]))
            layers: list[nn.Module] = []
            for i in range(max(1, doublings)):
                layers.append(conv_norm(channels if i else in_channels, channels, 3))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Turn levels ``(B, in_channels, H_i, W_i)`` into logits ``(B, classes, H_0, W_0)``."""
        first, *others = (head(level) for head, level in zip(self.scale_heads, levels, strict=True))
        for other in others:  # a side that is odd was not doubled exactly
            first = first + (other if size_of(other) == size_of(first) else resize(other, size_of(first)))
        return self.conv_seg(self.dropout(first))
