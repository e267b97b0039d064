"""How a token map is cut into groups that attend among themselves: short and long distance, padding and offsets."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


class Grouping(NamedTuple):
    """How an ``(height, width)`` token map is cut into groups that attend among themselves.

    A group holds ``rows x columns`` tokens that lie ``interval`` apart in both directions. Short-distance attention
    is interval 1. Source: CrossFormer, section 3.2.
    """

    height: int
    width: int
    rows: int
    columns: int
    interval: int

    @classmethod
    def of(cls, height: int, width: int, group_size: int, interval: int, dilation: int = 1) -> "Grouping":
        """The grouping of a map; one that is no larger than a group on its short side is a single group.

        Args:
            dilation: how far apart the tokens lie that would be neighbours in a map of 32 pixels a token, or 16.
        """
        rows, columns = ((side + dilation - 1) // dilation for side in (height, width))
        if min(rows, columns) <= group_size:
            return cls(height, width, rows, columns, dilation)
        return cls(height, width, group_size, group_size, interval * dilation)

    @property
    def is_whole(self) -> bool:
        """Whether the map is one group."""
        return self.interval == 1 and self.shape == (self.height, self.width)

    @property
    def blocks(self) -> tuple[int, int]:
        """How often the tokens of ``interval ** 2`` groups fit below and beside each other, the last ones in part."""
        if self.is_whole:
            return 1, 1
        down, across = self.rows * self.interval, self.columns * self.interval
        return (self.height + down - 1) // down, (self.width + across - 1) // across

    @property
    def padding(self) -> tuple[int, int]:
        """Rows to add at the bottom and columns to add on the right before the map can be cut."""
        if self.is_whole:
            return 0, 0
        down, across = self.blocks
        return down * self.rows * self.interval - self.height, across * self.columns * self.interval - self.width

    @property
    def is_padded(self) -> bool:
        """Whether there is padding; where sizes are not known yet, as in a graph for any size, there may be."""
        return not all(statically_known_true(pixels == 0) for pixels in self.padding)

    def group(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B * groups, rows * columns, C)``, padded with zeros."""
        bottom, right = self.padding
        if self.is_padded:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        down, across = self.blocks
        return rearrange(
            x,
            "b (rh gh ih) (rw gw iw) c -> (b rh rw ih iw) (gh gw) c",
            gh=self.rows, gw=self.columns, ih=self.interval, iw=self.interval, rh=down, rw=across,
        )  # fmt: skip

    def ungroup(self, tokens: Tensor) -> Tensor:
        """``(B * groups, heads, rows * columns, D)`` to ``(B, H, W, heads * D)``; what was padded is cut off."""
        down, across = self.blocks
        x = rearrange(
            tokens,
            "(b rh rw ih iw) h (gh gw) d -> b (rh gh ih) (rw gw iw) (h d)",
            gh=self.rows, gw=self.columns, ih=self.interval, iw=self.interval, rh=down, rw=across,
        )  # fmt: skip
        if not self.is_padded:
            return x
        if all(statically_known_true(pixels == 0) or statically_known_true(pixels > 0) for pixels in self.padding):
            return x[:, : self.height, : self.width]
        # Where sizes are not known yet, of a slice torch would ask whether it is the whole, and make a graph for each
        for dim, side in ((1, self.height), (2, self.width)):
            x = x.index_select(dim, torch.arange(side, device=x.device))
        return x

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a group."""
        return self.rows, self.columns

    def offsets(self, device: torch.device) -> Tensor:
        """The distinct offsets between two tokens of a group, query minus key.

        Returns:
            ``((2 * rows - 1) * (2 * columns - 1), 2)`` of (dy, dx) in steps of the interval.
        """
        make = _cached_offsets if may_cache() else _offsets
        return make(self.rows, self.columns, device)

    def for_each_pair(self, table: Tensor) -> Tensor:
        """From a value for each of the offsets, ``(..., offsets)``, to one for each pair ``(..., query, key)``.

        The value of dy = y_query - y_key lies at row dy + rows - 1, so that of a key the queries' values are a window
        of the table, and the window of the next key begins one row before. That needs no index, whose gradient
        would be summed up pair by pair; where a graph is made for elsewhere, an index is what others understand.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            index = _pair_index(self.rows, self.columns, table.device)
            return table.index_select(-1, index.flatten()).unflatten(-1, index.shape)
        windows = table.unflatten(-1, (2 * self.rows - 1, 2 * self.columns - 1))
        windows = windows.unfold(-2, self.rows, 1).unfold(-2, self.columns, 1)
        pairs = rearrange(windows, "... key_y key_x query_y query_x -> ... query_y query_x key_y key_x").flip(-2, -1)
        return rearrange(pairs, "... query_y query_x key_y key_x -> ... (query_y query_x) (key_y key_x)")

    def key_mask(self, device: torch.device) -> Tensor | None:
        """0 where a key is a token and -inf where it is padding, ``(groups, 1, 1, N)``; None when nothing is padded.

        A group without a single token is left unmasked: its output is cut off, and a softmax over nothing but
        -inf would put NaN into the gradient.
        """
        if not self.is_padded:
            return None
        make = _cached_key_mask if may_cache() else _key_mask
        return make(self, device)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make its GPU the current one, on which Triton starts kernels; a compiler sees to that itself."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def power_of_two(number: int) -> int:
    """The least one that is no smaller."""
    return 1 << (number - 1).bit_length()


def is_transformed() -> bool:
    """Whether a transformation of torch.func, as vmap and grad, is at work."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def may_cache() -> bool:
    """Whether tensors are real ones: a compiler folds them itself, and a cache would make it compile again.

    Nor may a trace depend on what was computed before it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    return type(torch.empty(0)) is Tensor


def size_of(x: Tensor) -> tuple[int, int]:
    """Height and width of a map ``(B, H, W, C)``; in a trace, which holds for one size, they are numbers."""
    height, width = x.shape[1:3]
    if not torch.jit.is_tracing():
        return height, width
    with warnings.catch_warnings(action="ignore", category=torch.jit.TracerWarning):
        return int(height), int(width)


def _offsets(rows: int, columns: int, device: torch.device) -> Tensor:
    dy, dx = torch.arange(1 - rows, rows, device=device), torch.arange(1 - columns, columns, device=device)
    return torch.stack(torch.meshgrid(dy, dx, indexing="ij"), dim=-1).flatten(0, 1).float()


def _pair_index(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where among the offsets that of a query and a key is, ``(query, key)``."""
    y, x = (torch.arange(size, device=device) for size in (rows, columns))
    dy, dx = (at[:, None] - at + at.shape[0] - 1 for at in (y, x))
    pairs = dy[:, None, :, None] * (2 * columns - 1) + dx[None, :, None, :]
    return pairs.flatten(2).flatten(0, 1)


def _key_mask(grouping: Grouping, device: torch.device) -> Tensor:
    is_token = grouping.group(torch.ones(1, grouping.height, grouping.width, 1, device=device)) > 0
    is_padding = ~is_token & is_token.any(dim=1, keepdim=True)
    mask = torch.zeros(is_padding.shape, device=device).masked_fill_(is_padding, float("-inf"))
    return rearrange(mask, "groups n 1 -> groups 1 1 n")


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached_offsets(rows: int, columns: int, device: torch.device) -> Tensor:
    return _offsets(rows, columns, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached_key_mask(grouping: Grouping, device: torch.device) -> Tensor:
    return _key_mask(grouping, device)
