"""How a token map is cut into groups that attend among themselves: short and long distance, padding and offsets."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


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
    def of(cls, height: int, width: int, group_size: int, interval: int) -> "Grouping":
        """The grouping of a map; one that is no larger than a group on its short side is a single group."""
        if min(height, width) <= group_size:
            return cls(height, width, height, width, 1)
        return cls(height, width, group_size, group_size, interval)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows to add at the bottom and columns to add on the right before the map can be cut."""
        return -self.height % (self.rows * self.interval), -self.width % (self.columns * self.interval)

    def group(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B * groups, rows * columns, C)``, padded with zeros."""
        bottom, right = self.padding
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return rearrange(
            x,
            "b (rh gh ih) (rw gw iw) c -> (b rh rw ih iw) (gh gw) c",
            gh=self.rows, gw=self.columns, ih=self.interval, iw=self.interval,
        )  # fmt: skip

    def ungroup(self, tokens: Tensor) -> Tensor:
        """``(B * groups, heads, rows * columns, D)`` to ``(B, H, W, heads * D)``; what was padded is cut off."""
        bottom, right = self.padding
        x = rearrange(
            tokens,
            "(b rh rw ih iw) h (gh gw) d -> b (rh gh ih) (rw gw iw) (h d)",
            gh=self.rows, gw=self.columns, ih=self.interval, iw=self.interval,
            rh=(self.height + bottom) // (self.rows * self.interval),
            rw=(self.width + right) // (self.columns * self.interval),
        )  # fmt: skip
        return x[:, : self.height, : self.width] if bottom or right else x

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
        would be summed up pair by pair.
        """
        windows = table.unflatten(-1, (2 * self.rows - 1, 2 * self.columns - 1))
        windows = windows.unfold(-2, self.rows, 1).unfold(-2, self.columns, 1)
        pairs = rearrange(windows, "... key_y key_x query_y query_x -> ... query_y query_x key_y key_x").flip(-2, -1)
        return rearrange(pairs, "... query_y query_x key_y key_x -> ... (query_y query_x) (key_y key_x)")

    def key_mask(self, device: torch.device) -> Tensor | None:
        """0 where a key is a token and -inf where it is padding, ``(groups, 1, 1, N)``; None when nothing is padded.

        A group without a single token is left unmasked: its output is cut off, and a softmax over nothing but
        -inf would put NaN into the gradient.
        """
        if self.padding == (0, 0):
            return None
        make = _cached_key_mask if may_cache() else _key_mask
        return make(self, device)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make its GPU the current one, on which Triton starts kernels; a compiler sees to that itself."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def power_of_two(number: int) -> int:
    """The least one that is no smaller."""
    return 1 << (number - 1).bit_length()


def may_cache() -> bool:
    """Whether tensors are real ones: a compiler folds them itself, and a cache would make it compile again."""
    return not torch.compiler.is_compiling() and type(torch.empty(0)) is Tensor


def _offsets(rows: int, columns: int, device: torch.device) -> Tensor:
    dy, dx = torch.arange(1 - rows, rows, device=device), torch.arange(1 - columns, columns, device=device)
    return torch.cartesian_prod(dy, dx).float()


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
