"""UPerNet: a pyramid over the last map's pools and all maps, joined at the size of the first.

Sources: Xiao et al., arXiv 1807.10221, section 3; pyramid pooling is that of Zhao et al., arXiv 1612.01105.
State-dict keys are those of published files: ``decode_head.`` and ``auxiliary_head.``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import classifier, conv_norm, resize, size_of

CHANNELS, AUXILIARY_CHANNELS = 512, 256
POOLS = 1, 2, 3, 6


class UPerNetHead(nn.Module):
    """Tells each place's class from all maps of a backbone.

    Args:
        in_channels: of the maps, from the finest to the coarsest.
        num_classes: classes to tell apart.
        drop_rate: dropout of whole channels before the last convolution.
        channels: of all that is inside.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, drop_rate: float = 0.1, channels: int = CHANNELS):
        super().__init__()
        *finer, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), conv_norm(last, channels)) for pool in POOLS
        )
        self.bottleneck = conv_norm(last + len(POOLS) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_norm(each, channels) for each in finer)
        self.fpn_convs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = conv_norm(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps ``(B, C_i, H_i, W_i)`` into logits ``(B, classes, H_0, W_0)``."""
        *finer, last = maps
        levels = [conv(each) for conv, each in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.pool(last))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], size_of(levels[i - 1]))
        joined = [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=False)] + levels[-1:]
        joined = [joined[0], *(resize(level, size_of(joined[0])) for level in joined[1:])]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(joined, dim=1))))

    def pool(self, last: Tensor) -> Tensor:
        """Join the coarsest map with its means over parts of the image, ``(B, channels, H, W)``."""
        pools = [resize(pool(last), size_of(last)) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([last, *pools], dim=1))


class FCNHead(nn.Module):
    """Tells each place's class from one map: an auxiliary head, whose loss helps the backbone along.

    Args:
        in_channels: of the map.
        num_classes: classes to tell apart.
        drop_rate: dropout of whole channels before the last convolution.
        channels: of what is inside.
    """

    def __init__(self, in_channels: int, num_classes: int, drop_rate: float = 0.1, channels: int = AUXILIARY_CHANNELS):
        super().__init__()
        self.convs = nn.Sequential(conv_norm(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Turn a map ``(B, C, H, W)`` into logits ``(B, classes, H, W)``."""
        return self.conv_seg(self.dropout(self.convs(x)))
