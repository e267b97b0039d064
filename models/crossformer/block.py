"""The blocks of a CrossFormer: attention within groups with a position bias, and an MLP; a stage is a list of them.

Token maps are ``(B, H, W, C)`` throughout.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, register_notrace_module
from torch import Tensor, nn

from .fusion import LayerNorm, add_branch, fused_attention, is_fused
from .grouping import Grouping, is_transformed, size_of
from .position_bias import (
    BiasCache,
    DynamicPositionBias,
    align_rows,
    is_plain,
    mask_keys,
    may_be_read,
    position_bias,
)
from .recomputing import product_dtype, recomputed
from .stochastic_depth import Branches, Drawn, draw_branches, picked


class CrossScaleAttention(nn.Module):
    """Multi-head self-attention within groups, with a position bias.

    Source: CrossFormer, section 3.2 and equation 1.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd: Any = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.pos = DynamicPositionBias(dim // 16, num_heads, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, grouping: Grouping, bias: Tensor | None) -> Tensor:
        """``(B, H, W, C)`` to the same shape.

        Args:
            grouping: of this map.
            bias: position bias, ``(1, heads, N, N)``; None to compute it here.
        """
        if bias is None:
            bias = self.position_bias(x, grouping)
        return self.attend(self.project(x, grouping), grouping, bias, x.shape[0])

    def position_bias(self, x: Tensor, grouping: Grouping) -> Tensor:
        """Compute the position bias for a map, ``(1, heads, N, N)``."""
        return position_bias(self.pos, grouping, x, product_dtype(x))

    def project(self, x: Tensor, grouping: Grouping) -> Tensor:
        """``(B, H, W, C)`` to queries, keys and values in groups of N, ``(B * groups, N, 3 * C)``.

        Where one kernel does it all they stay a map, ``(B, H, W, 3 * C)``.
        """
        x = x.to(product_dtype(x))  # first: the copy into groups is then smaller
        return self.qkv(x if self.is_fused(x, grouping) else grouping.group(x))

    def is_fused(self, x: Tensor, grouping: Grouping) -> bool:
        """Whether one kernel attends where the tokens lie, and nothing is copied into groups."""
        return is_fused(x) and fused_attention.fits(grouping, x.shape[-1] // self.num_heads)

    def attend(self, qkv: Tensor, grouping: Grouping, bias: Tensor, batch: int) -> Tensor:
        """What :meth:`project` returns of ``batch`` images, to ``(B, H, W, C)``; the others are as for :meth:`forward`.

        Tokens go back to their places before the last product, which needs them contiguous anyway.
        """
        if qkv.dim() == 4:
            return self.proj(fused_attention.attend(qkv, bias[0], grouping))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads).unbind()
        bias = mask_keys(bias, grouping)
        if grouping.is_padded:
            bias = align_rows(bias.repeat(batch, 1, 1, 1))
        if (bias.requires_grad or is_transformed()) and not bias.is_cuda and not torch.jit.is_tracing():
            tokens = explicit_attention(q, k, v, bias)
        else:
            tokens = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(grouping.ungroup(tokens))


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Equation 1 as it stands, ``(B, heads, N, D)`` each.

    Only on CUDA has torch a kernel for it that differentiates the bias. Elsewhere scaled_dot_product_attention would
    take these products too, and copy q, k and v one by one; stacking them makes all three contiguous in one copy.
    """
    q, k, v = torch.stack([q * q.shape[-1] ** -0.5, k, v])
    return (q @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v


class CrossFormerBlock(nn.Module):
    """Pre-norm attention and pre-norm MLP; in CrossFormer++ some blocks end with an ACL.

    The amplitude cooling layer (ACL) is a depthwise 3x3 convolution and a LayerNorm without a residual.
    Sources: CrossFormer, section 3; CrossFormer++, section 3.4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group_size: int,
        interval: int,
        mlp_ratio: float,
        drop_path_rate: float,
        amplitude_cooling: bool,
        dilation: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = dict(device=device, dtype=dtype)
        self.group_size = group_size
        self.interval = interval
        self.dilation = dilation
        self.drop_path_rate = drop_path_rate
        self.recompute = "none"
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = CrossScaleAttention(dim, num_heads, **dd)
        self.ex_conv = None
        if amplitude_cooling:
            self.ex_conv = nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim, **dd)
        self.ex_ln: Any = LayerNorm(dim, **dd) if amplitude_cooling else None
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor, grouping: Grouping, bias: Tensor | None, drawn: Branches) -> Tensor:
        """``(B, H, W, C)`` to the same shape.

        Args:
            grouping: of this map.
            bias: as for :class:`CrossScaleAttention`.
            drawn: the images that keep attention, and those that keep the MLP.
        """
        x = add_branch(x, self.attention_branch(x, grouping, bias, drawn[0]), drawn[0])
        x = add_branch(x, self.mlp_branch(x, drawn[1]), drawn[1])
        if self.ex_conv is not None:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x

    def attention_branch(self, x: Tensor, grouping: Grouping, bias: Tensor | None, drawn: Drawn | None) -> Tensor:
        """``(B, H, W, C)`` to that of the images that keep it, ``(computed, H, W, C)``."""
        if not (self.recompute == "selective" and self.training):
            return self.attn(self.norm1(x, drawn, for_product=True), grouping, bias)
        if not is_plain(self.attn, CrossScaleAttention):
            return recomputed(lambda x: self.attn(self.norm1(x, drawn, for_product=True), grouping, bias), x)
        bias = self.attn.position_bias(x, grouping) if bias is None else bias
        qkv = recomputed(lambda x: self.attn.project(self.norm1(x, drawn, for_product=True), grouping), x)
        return recomputed(self.attn.attend, qkv, grouping, bias, picked(x, drawn))

    def mlp_branch(self, x: Tensor, drawn: Drawn | None) -> Tensor:
        """``(B, H, W, C)`` to that of the images that keep it, ``(computed, H, W, C)``."""
        if not (self.recompute == "selective" and self.training):
            return self.mlp(self.norm2(x, drawn, for_product=True))
        if not is_plain(self.mlp, Mlp):
            return recomputed(lambda x: self.mlp(self.norm2(x, drawn, for_product=True)), x)
        hidden = recomputed(lambda x: self.mlp.fc1(self.norm2(x, drawn, for_product=True)), x)
        return recomputed(lambda hidden: self.mlp.fc2(self.mlp.act(hidden)), hidden)


@register_notrace_module  # torch.fx cannot follow the sizes of a map
class Blocks(nn.ModuleList):
    """The blocks of a stage, one after the other.

    What they need besides the map is made for all of them at once.
    """

    if TYPE_CHECKING:  # torch knows only that they are modules

        def __iter__(self) -> Iterator[CrossFormerBlock]: ...

    def __init__(self, blocks: Iterable[CrossFormerBlock]):
        super().__init__(blocks)
        self.bias_cache = BiasCache()

    def __prepare_scriptable__(self):
        """Answer torch.jit.script, which asks first: how a map is cut depends on its size, beyond TorchScript."""
        raise RuntimeError("CrossFormer cannot be scripted: use torch.export.export or torch.jit.trace")

    def train(self, mode: bool = True):
        self.bias_cache.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        size = size_of(x)
        groupings = [Grouping.of(*size, block.group_size, block.interval, block.dilation) for block in self]
        biases = self.position_biases(groupings, product_dtype(x))
        rates = tuple(block.drop_path_rate if block.training else 0.0 for block in self)
        branches = draw_branches(rates, x.shape[0], x.device)
        for block, grouping, bias, drawn in zip(self, groupings, biases, branches, strict=True):
            if block.recompute == "full" and block.training:
                x = recomputed(block, x, grouping, bias, drawn)
            else:
                x = block(x, grouping, bias, drawn)
        return x

    def position_biases(self, groupings: list[Grouping], dtype: torch.dtype) -> Sequence[Tensor | None]:
        """The position bias of each block, ``(1, heads, N, N)``; None where the blocks have to compute it."""
        for block in self:
            if type(block) is not CrossFormerBlock or not is_plain(block.attn, CrossScaleAttention):
                return [None] * len(self)
        mlps = [block.attn.pos for block in self]
        if not may_be_read(mlps):
            return [None] * len(self)
        return self.bias_cache.biases(mlps, groupings, dtype)


class Stage(nn.Module):
    """The blocks that work at one resolution, and the down-sampling to the next."""

    def __init__(self, blocks: Blocks, downsample: nn.Module):
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: Tensor, with_map: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """``(B, H, W, C)`` to what the next stage takes; ``with_map`` gives the map before down-sampling, and that."""
        x = self.blocks(x)
        return (x, self.downsample(x)) if with_map else self.downsample(x)
