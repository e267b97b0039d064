"""Whether the Triton kernels of this package take a tensor's place in torch's operations."""

import torch
from timm.layers import register_notrace_module, use_fused_attn
from torch import Tensor, nn

from .grouping import is_transformed
from .recomputing import product_dtype
from .stochastic_depth import Drawn, pick

try:
    from . import fused_attention, fused_residual
except ImportError:  # Triton comes with torch's builds for GPUs only
    fused_attention = fused_residual = None  # type: ignore[assignment]

LEAST_ELEMENTS = 1 << 20
"""Of a map: below, starting kernels takes longer than they do, and Triton's take longer to start than torch's."""

LEAST_CAPABILITY = 8
"""Ampere: Triton compiles for nothing older."""


def is_fused(x: Tensor) -> bool:
    """Whether these kernels compute with ``x``: large, on a GPU, in half precision, and nobody looks at operations.

    ``timm.layers.set_fused_attn(False)``, or TIMM_FUSED_ATTN=0 in the environment, keeps to torch's operations; so do
    exporters, tracers, the transformations of torch.func and subclasses of tensors.
    """
    if fused_attention is None or not x.is_cuda or not use_fused_attn():
        return False
    if product_dtype(x) not in (torch.bfloat16, torch.float16) or torch.version.cuda is None:
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and x.numel() > 0
    if x.numel() < LEAST_ELEMENTS or type(x) is not Tensor or torch.jit.is_tracing() or is_transformed():
        return False
    return torch.cuda.get_device_properties(x.device).major >= LEAST_CAPABILITY


@register_notrace_module  # torch.fx cannot follow where a tensor lies
class LayerNorm(nn.LayerNorm):
    """Torch's layer norm; one kernel also picks the images that a branch is computed for, and casts."""

    def forward(self, input: Tensor, drawn: Drawn | None = None, for_product: bool = False) -> Tensor:
        """``(B, ..., C)`` to ``(computed, ..., C)``.

        Args:
            drawn: which images; None for all.
            for_product: whether a matrix product follows, so that its precision suffices; else it is as torch has it,
                single precision under autocast.
        """
        if not is_fused(input) or self.weight is None or self.bias is None:
            return super().forward(pick(input, drawn))
        dtype = product_dtype(input)
        if not for_product and torch.is_autocast_enabled(input.device.type):
            dtype = torch.float32
        images, places = (None, None) if drawn is None else (drawn.images, drawn.places)
        return fused_residual.layer_norm(input, self.weight, self.bias, self.eps, dtype, images, places)


def add_branch(x: Tensor, branch: Tensor, drawn: Drawn | None) -> Tensor:
    """Sum ``x``, ``(B, H, W, C)``, and the residual branch of the images that keep it, ``(computed, H, W, C)``."""
    if drawn is None:
        return x + branch
    if is_fused(x):
        return fused_residual.add_branch(x, branch, *drawn)
    if drawn.images is None or drawn.places is None:
        return x + branch * drawn.scale.to(branch.dtype)
    return x + branch.index_select(0, drawn.places) * drawn.scale.to(branch.dtype)
