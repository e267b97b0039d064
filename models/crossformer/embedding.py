"""Cross-scale embedding layers: of the image, and between two stages. Source: CrossFormer, section 3.1."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .recomputing import recomputed

MIN_IMAGE_SIZE = 32
PATCH_KERNELS = (4, 8, 16, 32)
PATCH_STRIDE = 4
CELL_KERNEL = 16
"""From this size on a kernel of the first embedding is trained on a map of cells."""

REDUCTION_KERNELS = (2, 4)
REDUCTION_STRIDE = 2


@register_notrace_module
class PatchEmbed(nn.Module):
    """Cross-scale embedding layer of the image: patches of four sizes around the same centres.

    Larger kernels get fewer channels: D/2, D/4, D/8, D/8. Source: CrossFormer, section 3.1.
    """

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        dims = embed_dim // 2, embed_dim // 4, embed_dim // 8, embed_dim // 8
        self.projs: Any = nn.ModuleList(
            nn.Conv2d(in_chans, dim, kernel, stride=PATCH_STRIDE, padding=(kernel - PATCH_STRIDE) // 2)
            for dim, kernel in zip(dims, PATCH_KERNELS, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to tokens ``(B, H // 4, W // 4, C)``."""
        if min(x.shape[-2:]) < MIN_IMAGE_SIZE:
            raise ValueError(f"images are {x.shape[-2]} x {x.shape[-1]}; CrossFormer needs at least 32 x 32")
        x = torch.cat([self.project(x, proj) for proj in self.projs], dim=1)
        return self.norm(x.permute(0, 2, 3, 1))

    def project(self, x: Tensor, proj: nn.Conv2d) -> Tensor:
        """``proj(x)``; a large one, when trained, on cells: the gradient of its weights takes a third of the time."""
        if self.training and torch.is_grad_enabled() and proj.kernel_size[0] >= CELL_KERNEL:
            return recomputed(convolve_cells, x, proj)  # else the cells, as large as the image, would be kept
        return proj(x)


def convolve_cells(x: Tensor, proj: nn.Conv2d) -> Tensor:
    """``proj(x)`` on a map of cells (space to depth).

    The pixels of a cell, as large as the stride, become channels: 48 instead of 3. Then the stride is 1 and the kernel
    4 times smaller on each side, which is how matrix units like a convolution.
    """
    stride, padding = proj.stride[0], int(proj.padding[0])
    needed = (stride * (size // stride - 1) + proj.kernel_size[0] for size in x.shape[-2:])
    bottom, right = (pixels - size - padding for pixels, size in zip(needed, x.shape[-2:], strict=True))
    cells = F.pixel_unshuffle(F.pad(x, (padding, right, padding, bottom)), stride)
    if x.is_contiguous(memory_format=torch.channels_last):
        cells = cells.contiguous(memory_format=torch.channels_last)  # on CUDA they are not
    return F.conv2d(cells, F.pixel_unshuffle(proj.weight, stride), proj.bias)


class PatchMerging(nn.Module):
    """Cross-scale embedding layer between two stages: halves the map, doubles the channels.

    Source: CrossFormer, section 3.1.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.reductions = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel, stride=REDUCTION_STRIDE, padding=(kernel - REDUCTION_STRIDE) // 2)
            for kernel in REDUCTION_KERNELS
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H // 2, W // 2, 2C)``."""
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([reduction(x) for reduction in self.reductions], dim=1).permute(0, 2, 3, 1)
