"""CrossFormer and CrossFormer++ as the papers write them: read this before the fast network in ``models.crossformer``.

Nothing here is optimised: attention is an explicit softmax, every block computes its position bias in every call, and
all branches are computed, dropped or not. The fast network has the same weights under the same names; tests compare
its outputs and gradients with these, and ``scripts/benchmark.py`` its speed. Token maps are ``(B, H, W, C)``.
Sources: CrossFormer, arXiv 2108.00154; CrossFormer++, arXiv 2303.06908.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from models.crossformer import CROSSFORMERPP, VARIANTS


def offsets_within(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """List the distinct offsets (dy, dx) between two tokens of a group, and find the one of each pair.

    Returns:
        the offsets, ``((2 * rows - 1) * (2 * columns - 1), 2)``, and the index of that of each pair, ``(N, N)``.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    all_dy, all_dx = torch.arange(1 - rows, rows), torch.arange(1 - columns, columns)
    return torch.cartesian_prod(all_dy, all_dx).float(), (dy + rows - 1) * (2 * columns - 1) + (dx + columns - 1)


class DynamicPositionBias(nn.Module):
    """Section 3.3: an MLP from an offset to a bias for each head."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos2 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim))
        self.pos3 = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, num_heads))

    def forward(self, offsets: Tensor) -> Tensor:
        """``(offsets, 2)`` to ``(offsets, heads)``."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class Attention(nn.Module):
    """Equation 1: softmax(Q K^T / sqrt(d) + B) V within each group."""

    offsets: Tensor
    index: Tensor

    def __init__(self, dim: int, num_heads: int, group_size: int):
        super().__init__()
        self.num_heads, self.group_size = num_heads, group_size
        self.pos = DynamicPositionBias(dim // 16, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        offsets, index = offsets_within(group_size, group_size)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, rows: int, columns: int, is_token: Tensor | None) -> Tensor:
        """Attend within each group, ``(B, groups, N, C)`` to the same shape.

        Args:
            rows, columns: of a group; N is their product.
            is_token: ``(groups, N)``, False for padding, which nobody attends to; None where there is none.
        """
        offsets, index = self.offsets, self.index
        if (rows, columns) != (self.group_size, self.group_size):
            offsets, index = (t.to(x.device) for t in offsets_within(rows, columns))
        q, k, v = rearrange(self.qkv(x), "b groups n (three h d) -> three b groups h n d", three=3, h=self.num_heads)
        bias = rearrange(self.pos(offsets)[index.flatten()], "(n m) h -> h n m", n=rows * columns)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        if is_token is not None:
            # The smallest number and not -inf: a group of nothing but padding, which is cut off, must not become NaN
            scores = scores.masked_fill(~is_token[:, None, None, :], torch.finfo(scores.dtype).min)
        out = scores.softmax(dim=-1) @ v
        return self.proj(rearrange(out, "b groups h n d -> b groups n (h d)"))


class Mlp(nn.Module):
    """Two linear layers with four times the channels between them, and an exact GELU."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention at short (interval 1) or long distance, and a pre-norm MLP.

    Sources: CrossFormer, section 3.2; the amplitude cooling layer (ACL), CrossFormer++, section 3.4.
    """

    def __init__(self, dim: int, num_heads: int, group_size: int, interval: int, drop_path: float, acl: bool):
        super().__init__()
        self.group_size, self.interval = group_size, interval
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, group_size)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if acl else None
        self.ex_ln: Any = nn.LayerNorm(dim) if acl else None
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.ex_conv is not None:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Cut the map into groups of tokens that lie ``interval`` apart, attend, and put the tokens back.

        A map no larger than a group is one group; any other is padded on the right and at the bottom until it divides.
        """
        height, width = x.shape[1:3]
        rows, columns, interval = self.group_size, self.group_size, self.interval
        if min(height, width) <= self.group_size:
            rows, columns, interval = height, width, 1
        sizes = dict(gh=rows, gw=columns, ih=interval, iw=interval)
        to_groups = "b (rh gh ih) (rw gw iw) c -> b (rh rw ih iw) (gh gw) c"

        bottom, right = -height % (rows * interval), -width % (columns * interval)
        is_token = None
        if bottom or right:
            is_token = F.pad(x.new_ones(1, height, width, 1), (0, 0, 0, right, 0, bottom))
            is_token = rearrange(is_token, to_groups, **sizes)[0, :, :, 0] > 0
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        down = x.shape[1] // (rows * interval)
        tokens = self.attn(rearrange(x, to_groups, **sizes), rows, columns, is_token)
        x = rearrange(tokens, "b (rh rw ih iw) (gh gw) c -> b (rh gh ih) (rw gw iw) c", rh=down, **sizes)
        return x[:, :height, :width]


class PatchEmbed(nn.Module):
    """Section 3.1: patches of four sizes around the same centres."""

    def __init__(self, dim: int):
        super().__init__()
        sizes = ((4, dim // 2), (8, dim // 4), (16, dim // 8), (32, dim // 8))
        self.projs = nn.ModuleList(nn.Conv2d(3, out, k, stride=4, padding=(k - 4) // 2) for k, out in sizes)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to ``(B, H / 4, W / 4, C)``."""
        return self.norm(torch.cat([proj(x) for proj in self.projs], dim=1).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Section 3.1, between two stages: half the height and width, twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.reductions = nn.ModuleList(nn.Conv2d(dim, dim, k, stride=2, padding=(k - 2) // 2) for k in (2, 4))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, H / 2, W / 2, 2 C)``."""
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([reduction(x) for reduction in self.reductions], dim=1).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """The blocks of one resolution, and the way to the next."""

    def __init__(self, blocks: list[Block], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class PlainCrossFormer(nn.Module):
    """CrossFormer, or with ``amplitude_cooling`` CrossFormer++; arguments as those of ``models.crossformer``."""

    def __init__(
        self,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        group_size: Sequence[int] = (7, 7, 7, 7),
        interval: Sequence[int] = (8, 4, 2, 1),
        amplitude_cooling: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
    ):
        super().__init__()
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.patch_embed = PatchEmbed(embed_dim)
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(depths):
            dim, last = embed_dim * 2**stage, stage == len(depths) - 1
            blocks = []
            for j in range(depth):
                acl = amplitude_cooling and (j + 1) % 3 == 0 and j < depth - 1
                i = interval[stage] if j % 2 else 1
                blocks.append(Block(dim, num_heads[stage], group_size[stage], i, next(rates), acl))
            self.layers.append(Stage(blocks, nn.Identity() if last else PatchMerging(dim)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, classes)``."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.head(self.norm(x).mean(dim=(1, 2)))


def plain(name: str, **overrides) -> PlainCrossFormer:
    """Build the variant that timm knows by ``name``; for initial weights load those of timm's model."""
    progressive = CROSSFORMERPP if name.startswith("crossformerpp") else {}
    return PlainCrossFormer(**{**VARIANTS[name], **progressive, **overrides})
