"""Cross-scale embedding layers: of the image, and between two stages. Source: CrossFormer, section 3.1."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .fusion import LayerNorm, is_fused
from .grouping import is_transformed, size_of
from .position_bias import is_plain
from .recomputing import product_dtype, recomputed

MIN_IMAGE_SIZE = 32
PATCH_KERNELS = (4, 8, 16, 32)
PATCH_STRIDE = 4
CELL_KERNEL = 16
"""From this size on a kernel of the first embedding is trained on a map of cells."""

CHANNELS_AT_ONCE = 64
"""A GPU's convolution with as many output channels as a multiple of this takes its fast kernels."""

REDUCTION_KERNELS = (2, 4)
REDUCTION_STRIDE = 2


@register_notrace_module
class PatchEmbed(nn.Module):
    """Cross-scale embedding layer of the image: patches of four sizes around the same centres.

    Larger kernels get fewer channels: D/2, D/4, D/8, D/8. Source: CrossFormer, section 3.1.
    """

    def __init__(self, in_chans: int, embed_dim: int, device=None, dtype=None):
        super().__init__()
        dd: Any = dict(device=device, dtype=dtype)
        dims = embed_dim // 2, embed_dim // 4, embed_dim // 8, embed_dim // 8
        self.projs: Any = nn.ModuleList(
            nn.Conv2d(in_chans, dim, kernel, stride=PATCH_STRIDE, padding=(kernel - PATCH_STRIDE) // 2, **dd)
            for dim, kernel in zip(dims, PATCH_KERNELS, strict=True)
        )
        self.norm = LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to tokens ``(B, H // 4, W // 4, C)``."""
        height, width = size_of(x.permute(0, 2, 3, 1))
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(f"images are {height} x {width}; CrossFormer needs at least 32 x 32")
        if torch.jit.is_tracing():
            x = x.expand(-1, -1, height, width)  # so that the trace, which holds for this size, refuses another
        if is_fused(x) and all(is_plain(proj, nn.Conv2d) for proj in self.projs):
            x = self.project_together(x)
        else:
            x = torch.cat([self.project(x, proj) for proj in self.projs], dim=1)
        return self.norm(x.permute(0, 2, 3, 1))

    def project_together(self, x: Tensor) -> Tensor:
        """All of ``projs`` for matrix units: the smallest kernel is a product, the others are one convolution.

        Each of the larger ones alone takes as long there as all of them, since a convolution's channels are computed
        by the 64. So they grow to the largest, with zeros around.
        """
        x = x.to(product_dtype(x))
        smallest, *others = self.projs
        cells = cells_of(x, smallest).permute(0, 2, 3, 1)
        tokens = F.linear(cells, F.pixel_unshuffle(smallest.weight, PATCH_STRIDE).flatten(1), smallest.bias)
        largest = others[-1].kernel_size[0]
        weight = torch.cat([F.pad(proj.weight, [(largest - proj.kernel_size[0]) // 2] * 4) for proj in others])
        bias = torch.cat([proj.bias for proj in others])
        missing = -len(bias) % CHANNELS_AT_ONCE
        weight, bias = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)), F.pad(bias, (0, missing))
        map = F.conv2d(cells_of(x, others[-1]), F.pixel_unshuffle(weight, PATCH_STRIDE), bias)
        return torch.cat([tokens.permute(0, 3, 1, 2), map[:, : map.shape[1] - missing]], dim=1)

    def project(self, x: Tensor, proj: nn.Conv2d) -> Tensor:
        """``proj(x)``; a large one, when trained, on cells: the gradient of its weights takes a third of the time."""
        may_recompute = self.training and torch.is_grad_enabled() and not is_transformed()
        if may_recompute and proj.kernel_size[0] >= CELL_KERNEL and is_plain(proj, nn.Conv2d):
            return recomputed(convolve_cells, x, proj)  # else the cells, as large as the image, would be kept
        return proj(x)


def convolve_cells(x: Tensor, proj: nn.Conv2d) -> Tensor:
    """``proj(x)`` on a map of cells, with stride 1 and a kernel that is 4 times smaller on each side."""
    return F.conv2d(cells_of(x, proj), F.pixel_unshuffle(proj.weight, PATCH_STRIDE), proj.bias)


def cells_of(x: Tensor, proj: nn.Conv2d) -> Tensor:
    """The map of cells (space to depth) that ``proj`` sees, ``(B, 48, H', W')``.

    The pixels of a cell, as large as the stride, become channels: 48 instead of 3, which is how matrix units like it.
    """
    padding = int(proj.padding[0])
    needed = (PATCH_STRIDE * (size // PATCH_STRIDE - 1) + proj.kernel_size[0] for size in x.shape[-2:])
    bottom, right = (pixels - size - padding for pixels, size in zip(needed, x.shape[-2:], strict=True))
    cells = F.pixel_unshuffle(F.pad(x, (padding, right, padding, bottom)), PATCH_STRIDE)
    if x.is_contiguous(memory_format=torch.channels_last):
        cells = cells.contiguous(memory_format=torch.channels_last)  # on CUDA they are not
    return cells


class PatchMerging(nn.Module):
    """Cross-scale embedding layer between two stages: halves the map, doubles the channels.

    Source: CrossFormer, section 3.1. With a stride of 1 the map keeps its size (``output_stride``).

    Args:
        dilation: how far apart the tokens of a kernel lie.
    """

    def __init__(self, dim: int, stride: int = REDUCTION_STRIDE, dilation: int = 1, device=None, dtype=None):
        super().__init__()
        how: Any = dict(stride=stride, dilation=dilation, device=device, dtype=dtype)
        self.stride, self.dilation = stride, dilation
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel, padding=dilation * (kernel - REDUCTION_STRIDE) // 2, **how)
            for kernel in REDUCTION_KERNELS
        )
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H // 2, W // 2, 2C)``, or with a stride of 1 ``(B, H, W, 2C)``."""
        x = self.norm(x, for_product=True).permute(0, 3, 1, 2)
        if self.stride == 1:
            x = F.pad(x, (0, self.dilation, 0, self.dilation))  # kernels of an even size reach further to the right
        return torch.cat([reduction(x) for reduction in self.reductions], dim=1).permute(0, 2, 3, 1)
