"""What differs when many devices train one model: wrapping, synchronising, the gradient's norm."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from utils.distributed import world_size
from utils.sync_batch_norm import synchronise_batch_norm


def wrap(model: nn.Module, device: torch.device, sync_batch_norm: bool = False) -> nn.Module:
    """Let several processes train ``model`` as one; in a single process it stays as it is.

    To be called before the optimizer is built, which takes the wrapped model's parameters.

    Args:
        sync_batch_norm: whether BatchNorm normalises over the batches of all processes.
    """
    if world_size() == 1:
        return model
    if sync_batch_norm:
        synchronise_batch_norm(model, device)
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Give the model itself, whose names are those of checkpoints."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync(model: nn.Module, on: bool) -> AbstractContextManager:
    """Let the backward pass in this block average the gradients over the ranks, or leave that to a later one."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not on else nullcontext()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to ``max_norm``; returns their norm before, 0-d on the device."""
    return clip_grad_norm_(parameters, max_norm)
