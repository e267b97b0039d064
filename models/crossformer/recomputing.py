"""Recomputing in the backward pass what the forward pass does not keep; and the precision of matrix products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable, *inputs: Any) -> Tensor:
    """``function(*inputs)``, of which only the inputs and the result are kept for the backward pass.

    Recomputing ends where the last operation's inputs are there again, so a matrix product at the end of ``function``
    is not done twice. Nothing in it may be drawn at random: it would be drawn anew (:class:`Blocks` draws outside).
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of ``x`` are computed in."""
    kind = x.device.type
    # Of all devices that networks run on, meta alone knows nothing of autocast; not every torch.compile can follow
    # torch.amp.is_autocast_available
    autocasts = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocasts else x.dtype
