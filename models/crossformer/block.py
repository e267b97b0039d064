"""The blocks of a CrossFormer: attention within groups with a position bias, and an MLP; a stage is a list of them.

Token maps are ``(B, H, W, C)`` throughout.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, register_notrace_module
from torch import Tensor, nn

from .fusion import LayerNorm, add_branch, fused_attention, is_fused
from .grouping import Grouping
from .position_bias import BiasCache, DynamicPositionBias, align_rows, mask_keys
from .recomputing import product_dtype, recomputed
from .stochastic_depth import Branches, Drawn, draw_branches


class CrossScaleAttention(nn.Module):
    """Multi-head self-attention within groups, with a position bias.

    Source: CrossFormer, section 3.2 and equation 1.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.pos = DynamicPositionBias(dim // 16, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grouping: Grouping, bias: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape.

        Args:
            grouping: of this map.
            bias: position bias, ``(1, heads, N, N)``.
        """
        return self.attend(self.project(x, grouping), grouping, bias)

    def project(self, x: Tensor, grouping: Grouping) -> Tensor:
        """``(B, H, W, C)`` to queries, keys and values in groups of N, ``(B * groups, N, 3 * C)``.

        Where one kernel does it all they stay a map, ``(B, H, W, 3 * C)``.
        """
        x = x.to(product_dtype(x))  # first: the copy into groups is then smaller
        return self.qkv(x if self.is_fused(x, grouping) else grouping.group(x))

    def is_fused(self, x: Tensor, grouping: Grouping) -> bool:
        """Whether one kernel attends where the tokens lie, and nothing is copied into groups."""
        return is_fused(x) and fused_attention.fits(grouping, x.shape[-1] // self.num_heads)

    def attend(self, qkv: Tensor, grouping: Grouping, bias: Tensor) -> Tensor:
        """What :meth:`project` returns, to ``(B, H, W, C)``; the other arguments are those of :meth:`forward`.

        Tokens go back to their places before the last product, which needs them contiguous anyway.
        """
        if qkv.dim() == 4:
            return self.proj(fused_attention.attend(qkv, bias[0], grouping))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        bias = mask_keys(bias, grouping)
        if bias.shape[0] > 1:
            bias = align_rows(bias.repeat(q.shape[0] // bias.shape[0], 1, 1, 1))
        if bias.requires_grad and not bias.is_cuda:
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
    return (q @ k.mT + bias).softmax(dim=-1) @ v


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
    ):
        super().__init__()
        self.group_size = group_size
        self.interval = interval
        self.drop_path_rate = drop_path_rate
        self.recompute = "none"
        self.norm1 = LayerNorm(dim)
        self.attn = CrossScaleAttention(dim, num_heads)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if amplitude_cooling else None
        self.ex_ln: Any = LayerNorm(dim) if amplitude_cooling else None
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio))

    def forward(self, x: Tensor, grouping: Grouping, bias: Tensor, drawn: Branches) -> Tensor:
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

    def attention_branch(self, x: Tensor, grouping: Grouping, bias: Tensor, drawn: Drawn | None) -> Tensor:
        """``(B, H, W, C)`` to that of the images that keep it, ``(computed, H, W, C)``."""
        if not (self.recompute == "selective" and self.training):
            return self.attn(self.norm1(x, drawn, for_product=True), grouping, bias)
        qkv = recomputed(lambda x: self.attn.project(self.norm1(x, drawn, for_product=True), grouping), x)
        return recomputed(self.attn.attend, qkv, grouping, bias)

    def mlp_branch(self, x: Tensor, drawn: Drawn | None) -> Tensor:
        """``(B, H, W, C)`` to that of the images that keep it, ``(computed, H, W, C)``."""
        if not (self.recompute == "selective" and self.training):
            return self.mlp(self.norm2(x, drawn, for_product=True))
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

    def train(self, mode: bool = True):
        self.bias_cache.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        dtype, (height, width) = product_dtype(x), x.shape[1:3]
        groupings = [Grouping.of(height, width, block.group_size, block.interval) for block in self]
        biases = self.bias_cache.biases([block.attn.pos for block in self], groupings, dtype)
        rates = tuple(block.drop_path_rate if block.training else 0.0 for block in self)
        branches = draw_branches(rates, x.shape[0], x.device)
        for block, grouping, bias, drawn in zip(self, groupings, biases, branches, strict=True):
            if block.recompute == "full" and block.training:
                x = recomputed(block, x, grouping, bias, drawn)
            else:
                x = block(x, grouping, bias, drawn)
        return x


class Stage(nn.Module):
    """The blocks that work at one resolution, and the down-sampling to the next (the caller applies it)."""

    def __init__(self, blocks: Blocks, downsample: nn.Module):
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape; ``downsample`` is not applied."""
        return self.blocks(x)
