"""Stochastic depth that does not compute what it drops.

As published (Huang et al., arXiv 1603.09382), an image loses each branch with the rate of its block, whatever else it
loses. Only how the images of a batch depend on one another differs: how many of them keep a branch is not left to
chance, but for a fraction. So it is known before anything is drawn, and shapes are static.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .grouping import may_cache

SHARES = 32
"""The number of computed images is a multiple of a 32nd of the batch, so that few shapes have to be compiled."""


class Drawn(NamedTuple):
    """Which images a branch is computed for, and what it is multiplied with there.

    Kept branches are scaled up, so that the mean stays; the factor is 0 for an image that is computed in vain.
    """

    images: Tensor | None
    """Indices ``(computed,)``; None for the whole batch as it is."""
    scale: Tensor
    """``(computed, 1, 1, 1)``"""


Branches = tuple[Drawn | None, Drawn | None]
"""Of a block: for its attention and for its MLP; None where nothing is dropped."""


def draw_branches(rates: tuple[float, ...], batch: int, dtype: torch.dtype, device: torch.device) -> list[Branches]:
    """What to drop in a batch of ``batch`` images, for a stage whose blocks have these rates.

    For each branch the images are put in a random order. The first ``batch * (1 - rate)`` of them keep it, and the
    next one does with the probability of the fraction that is left.
    """
    if not any(rates):
        return [(None, None)] * len(rates)
    keep_rates, limits = (_cached_limits if may_cache() else _limits)(rates, batch, device)
    order = torch.rand(len(rates), 2, batch, device=device).argsort(dim=-1)
    scale_at_place = ((torch.rand(len(rates), 2, 1, device=device) < limits) / keep_rates).to(dtype)
    scale_of_image = scale_at_place.gather(-1, order)
    drawn: list[Branches] = []
    for i, rate in enumerate(rates):
        computed = computed_images(rate, batch)
        if not rate:
            drawn.append((None, None))
        elif computed == batch:
            drawn.append(tuple(Drawn(None, scale.view(-1, 1, 1, 1)) for scale in scale_of_image[i]))
        else:
            pairs = zip(order[i, :, :computed], scale_at_place[i, :, :computed], strict=True)
            drawn.append(tuple(Drawn(images, scale.view(-1, 1, 1, 1)) for images, scale in pairs))
    return drawn


def computed_images(rate: float, batch: int) -> int:
    """How many of ``batch`` images a branch that is dropped at ``rate`` is computed for."""
    share = max(1, batch // SHARES)
    return min(batch, math.ceil(batch * (1 - rate) / share) * share)


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drawn: Drawn | None) -> Tensor:
    """``x`` and its residual branch where that is kept, ``(B, H, W, C)``."""
    if drawn is None:
        return x + branch(x)
    if drawn.images is None:
        return x + branch(x) * drawn.scale
    return AddScaled.apply(x, branch(x.index_select(0, drawn.images)), drawn.scale, drawn.images)


class AddScaled(torch.autograd.Function):
    """``x.index_add(0, images, branch * scale)``, which by itself would keep the product for the backward pass."""

    @staticmethod
    def forward(x: Tensor, branch: Tensor, scale: Tensor, images: Tensor) -> Tensor:
        return x.index_add(0, images, branch * scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, images = ctx.saved_tensors
        return grad, grad.index_select(0, images) * scale, None, None


def _limits(rates: tuple[float, ...], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rates of keeping ``(blocks, 1, 1)``, and the probability to keep the image at each place of the order."""
    keep_rates = 1 - torch.tensor(rates, device=device).reshape(-1, 1, 1)
    return keep_rates, batch * keep_rates - torch.arange(batch, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached_limits(rates: tuple[float, ...], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _limits(rates, batch, device)
