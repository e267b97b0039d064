"""A feature pyramid. Source: Lin et al., arXiv 1612.03144. State-dict keys are those of published files: ``neck.``."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import bare_conv, size_of

PYRAMID_CHANNELS = 256


class FPN(nn.Module):
    """A feature pyramid: each map, and what the coarser ones know, with the same number of channels.

    Args:
        in_channels: of the maps, from the finest to the coarsest.
        channels: of each level of the result.
        extra: coarser levels by convolutions with stride 2, the first one of the last map.
        relu: between these.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int = PYRAMID_CHANNELS, extra: int = 0, relu: bool = False
    ):
        super().__init__()
        self.relu = relu
        self.lateral_convs = nn.ModuleList(bare_conv(each, channels) for each in in_channels)
        self.fpn_convs = nn.ModuleList(bare_conv(channels, channels, 3) for _ in in_channels)
        for i in range(extra):
            self.fpn_convs.append(bare_conv(channels if i else in_channels[-1], channels, 3, stride=2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Turn maps ``(B, C_i, H_i, W_i)`` into levels ``(B, channels, H_i, W_i)`` and those that are coarser."""
        levels = [conv(each) for conv, each in zip(self.lateral_convs, maps, strict=True)]
        for finer, coarser in zip(range(len(levels) - 2, -1, -1), range(len(levels) - 1, 0, -1), strict=True):
            levels[finer] = levels[finer] + F.interpolate(levels[coarser], size=size_of(levels[finer]), mode="nearest")
        levels = [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=False)]
        coarsest = maps[-1]
        for i, conv in enumerate(list(self.fpn_convs)[len(levels) :]):
            coarsest = conv(F.relu(coarsest) if i and self.relu else coarsest)
            levels.append(coarsest)
        return levels
