"""CrossFormer and CrossFormer++ as the papers write them: eager, one operation after the other, and nothing kept.

What tests compare ``models.crossformer`` with, and what benchmarks race it against: weights load from one into the
other. Attention is an explicit softmax, and every block works out its position bias anew in every call.
Sources: CrossFormer, arXiv 2108.00154; CrossFormer++, arXiv 2303.06908.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models.crossformer import CROSSFORMERPP, VARIANTS


def offsets_within(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The distinct (dy, dx) of two tokens of a group, ``(offsets, 2)``, and which of them a pair has, ``(N, N)``."""
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
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class Attention(nn.Module):
    """Equation 1: softmax(Q K^T / sqrt(d) + B) V within each group."""

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
        """Tokens ``(B, groups, N, C)``, N = rows * columns; ``is_token``, ``(groups, N)``, where some are padding."""
        offsets, index = self.offsets, self.index
        if (rows, columns) != (self.group_size, self.group_size):
            offsets, index = (t.to(x.device) for t in offsets_within(rows, columns))
        batch, groups, n, dim = x.shape
        qkv = self.qkv(x).reshape(batch, groups, n, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
        bias = self.pos(offsets)[index.flatten()].reshape(n, n, self.num_heads).permute(2, 0, 1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        if is_token is not None:
            # The smallest number and not -inf: a group of nothing but padding, which is cut off, must not become NaN
            scores = scores.masked_fill(~is_token[:, None, None, :], torch.finfo(scores.dtype).min)
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(2, 3).reshape(batch, groups, n, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Section 3.2: attention at short (interval 1) or long distance, and an MLP; ``acl``: section 3.4 of the second."""

    def __init__(self, dim: int, num_heads: int, group_size: int, interval: int, drop_path: float, acl: bool):
        super().__init__()
        self.group_size, self.interval = group_size, interval
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, group_size)
        self.ex_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if acl else None
        self.ex_ln = nn.LayerNorm(dim) if acl else None
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def attend(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        rows = columns = self.group_size
        i = self.interval
        if min(height, width) <= self.group_size:
            rows, columns, i = height, width, 1
        bottom, right = -height % (rows * i), -width % (columns * i)
        is_token = None
        if bottom or right:
            is_token = F.pad(x.new_ones(1, height, width, 1), (0, 0, 0, right, 0, bottom))
            is_token = self.group(is_token, rows, columns, i).reshape(-1, rows * columns) > 0
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        groups = self.group(x, rows, columns, i)
        tokens = self.attn(groups.reshape(batch, -1, rows * columns, dim), rows, columns, is_token)
        x = tokens.reshape(groups.shape).permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(x.shape)
        return x[:, :height, :width]

    @staticmethod
    def group(x: Tensor, rows: int, columns: int, i: int) -> Tensor:
        """``(B, H, W, C)`` to ``(B, down, across, i, i, rows, columns, C)``: tokens i apart belong together."""
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height // (rows * i), rows, i, width // (columns * i), columns, i, dim)
        return x.permute(0, 1, 4, 3, 6, 2, 5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.ex_conv is not None:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x


class PatchEmbed(nn.Module):
    """Section 3.1: patches of four sizes around the same centres."""

    def __init__(self, dim: int):
        super().__init__()
        sizes = ((4, dim // 2), (8, dim // 4), (16, dim // 8), (32, dim // 8))
        self.projs = nn.ModuleList(nn.Conv2d(3, out, k, stride=4, padding=(k - 4) // 2) for k, out in sizes)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([proj(x) for proj in self.projs], dim=1).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Section 3.1, between two stages."""

    def __init__(self, dim: int):
        super().__init__()
        self.reductions = nn.ModuleList(nn.Conv2d(dim, dim, k, stride=2, padding=(k - 2) // 2) for k in (2, 4))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).permute(0, 3, 1, 2)
        return torch.cat([reduction(x) for reduction in self.reductions], dim=1).permute(0, 2, 3, 1)


class Stage(nn.Module):
    def __init__(self, blocks: list[Block], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class PlainCrossFormer(nn.Module):
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
    """The variant that timm knows by ``name``, without its initial weights: load those of the other one."""
    progressive = CROSSFORMERPP if name.startswith("crossformerpp") else {}
    return PlainCrossFormer(**{**VARIANTS[name], **progressive, **overrides})
