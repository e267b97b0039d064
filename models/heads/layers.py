"""What the heads are built of, with the names that published files have for it."""

from collections import OrderedDict
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(in_channels: int, channels: int, kernel: int = 1) -> nn.Sequential:
    """Build a convolution that keeps the size, BatchNorm and ReLU, with the keys ``conv`` and ``bn``."""
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True)))


def bare_conv(in_channels: int, channels: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Build a convolution with a bias that keeps the size, or divides it by ``stride``, with the key ``conv``."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return nn.Sequential(OrderedDict(conv=conv))


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Build the 1x1 convolution that gives each place its logits."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize a map ``(B, C, H, W)`` to a height and a width, bilinearly, corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def size_of(x: Tensor) -> tuple[int, int]:
    """Height and width of a map ``(B, C, H, W)``."""
    return x.shape[-2], x.shape[-1]
