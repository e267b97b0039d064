"""Stochastic depth that does not compute what it drops.

As published (Huang et al., arXiv 1603.09382), an image loses each branch with the rate of its block, whatever else it
loses. Only how the images of a batch depend on one another differs: how many of them keep a branch is not left to
chance, but for a fraction. So it is known before anything is drawn, and shapes are static.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .grouping import may_cache

SHARES = 32
"""The number of computed images is a multiple of a 32nd of the batch, so that fewer shapes have to be compiled."""


class Drawn(NamedTuple):
    """Which images of a batch keep a branch, and for which it is computed."""

    scale: Tensor
    """What the branch of each image is multiplied with, ``(B, 1, 1, 1)``: 0, or so much that the mean stays."""
    images: Tensor | None = None
    """For which images the branch is computed, ``(computed,)``; None for all, as they are."""
    places: Tensor | None = None
    """Where among them each image's branch is, ``(B,)``; anywhere for an image that loses it."""


Branches = tuple[Drawn | None, Drawn | None]
"""Of a block: for its attention and for its MLP; None where nothing is dropped."""


def draw_branches(rates: tuple[float, ...], batch: int, device: torch.device) -> list[Branches]:
    """What to drop in a batch of ``batch`` images, for a stage whose blocks have these rates.

    For each branch the images are put in a random order. The first ``batch * (1 - rate)`` of them keep it, and the
    next one does with the probability of the fraction that is left.
    """
    if not any(rates):
        return [(None, None)] * len(rates)
    keep_rates, limits, sizes = (_cached_limits if may_cache() else _limits)(rates, batch, device)
    places = torch.rand(len(rates), 2, batch, dtype=torch.float32, device=device).argsort(dim=-1)
    is_kept = torch.rand(len(rates), 2, 1, dtype=torch.float32, device=device) < limits
    scale = (is_kept / keep_rates).gather(-1, places).reshape(len(rates), 2, batch, 1, 1, 1)
    if computed_images(max(rates), batch) < batch:
        # Images that lose the branch are spread over the computed ones: their gradients, all 0, are added there.
        images, places = places.argsort(dim=-1), places.remainder(sizes)
    drawn: list[Branches] = []
    for i, rate in enumerate(rates):
        size = computed_images(rate, batch)
        if not rate:
            drawn.append((None, None))
        elif size == batch:
            drawn.append((Drawn(scale[i, 0]), Drawn(scale[i, 1])))
        else:
            attention, mlp = [Drawn(scale[i, j], images[i, j, :size], places[i, j]) for j in range(2)]
            drawn.append((attention, mlp))
    return drawn


def computed_images(rate: float, batch: int) -> int:
    """For how many of ``batch`` images a branch is computed that is dropped at ``rate``."""
    share = max(1, batch // SHARES)
    return min(batch, math.ceil(batch * (1 - rate) / share) * share)


def pick(x: Tensor, drawn: Drawn | None) -> Tensor:
    """Give the images for which a branch is computed, ``(computed, H, W, C)`` of ``(B, H, W, C)``."""
    return x if drawn is None or drawn.images is None else x.index_select(0, drawn.images)


def picked(x: Tensor, drawn: Drawn | None) -> int:
    """Count the images that :func:`pick` gives."""
    return x.shape[0] if drawn is None or drawn.images is None else drawn.images.shape[0]


def _limits(rates: tuple[float, ...], batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block: the rate of keeping, ``(blocks, 1, 1)``; with which probability the image at each place is kept,
    ``(blocks, 1, batch)``; how many images are computed, ``(blocks, 1, 1)``.

    Of constants on the device: with a tensor made on the host, torch.compile would not use CUDA graphs.
    """
    keep = torch.stack([torch.full((1, 1), 1 - rate, dtype=torch.float32, device=device) for rate in rates])
    sizes = torch.stack([torch.full((1, 1), computed_images(rate, batch), device=device) for rate in rates])
    return keep, batch * keep - torch.arange(batch, device=device), sizes


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached_limits(rates: tuple[float, ...], batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return _limits(rates, batch, device)
