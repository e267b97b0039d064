"""The processes of a run. Everything here also works without ``torchrun``, as one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError


class AgreedError(UserError):
    """A :class:`UserError` that every rank has raised; only rank 0 needs to print it."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def start() -> torch.device:
    """Join the other processes that ``torchrun`` has started, if any, and choose this one's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this host has no GPU: there are {torch.cuda.device_count()}; "
                "start torchrun with --nproc_per_node no larger than that"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size() > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor (in place)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers."""
    tensor = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def broadcast_from_main(tensor: torch.Tensor) -> None:
    """Give the tensor rank 0's values (in place)."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


@contextmanager
def agreement() -> Iterator[None]:
    """If any rank meets a :class:`UserError` in this block, all of them raise the first one when it ends.

    Without it the ranks that met no error would wait for the others in their next collective. For the same reason
    the block itself must not contain a collective.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    message = None if error is None else str(error)
    messages: list[str | None] = [message]
    if dist.is_initialized():
        messages = [None] * world_size()
        dist.all_gather_object(messages, message)
    first = next((m for m in messages if m is not None), None)
    if first is not None:
        raise AgreedError(first) from error
