"""The processes of a run. Everything here also works without ``torchrun``, as one process."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError

JOIN_SECONDS = 600
"""How long ranks wait for each other when they start; a slow host may take minutes to import torch."""
JOIN_POLL_SECONDS = 0.02
_store: dist.Store | None = None


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
    global _store
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
        _store = _store_of_this_attempt()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store,
            rank=rank(),
            world_size=world_size(),
            device_id=device if device.type == "cuda" else None,
        )
    return device


def shared_store() -> dist.Store | None:
    """What all processes can read and write, key by key; None for a single one."""
    return _store


def _store_of_this_attempt() -> dist.Store:
    """The launcher's key-value store, with a prefix that no earlier attempt has used.

    When torchrun starts all ranks again, because one was lost or a host has joined, it keeps its store. Where the lost
    ranks once listened is still written there, and whoever reads that before a new rank has replaced it waits for
    ever. So rank 0 gives the attempt a new name, and the others believe a name only when its rank 0 answers them.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    me, deadline = uuid.uuid4().hex, time.monotonic() + JOIN_SECONDS
    if is_main():
        others = [f"{me}/{other}" for other in range(1, world_size())]
        store.set("attempt", me)
        while not store.check(others):
            if time.monotonic() > deadline:
                missing = [key.split("/")[1] for key in others if not store.check([key])]
                raise UserError(f"rank {', '.join(missing)} has not joined in {JOIN_SECONDS} s; look at its host")
            time.sleep(JOIN_POLL_SECONDS)
        store.set(f"{me}/all", b" ".join(store.get(key) for key in others))
        return dist.PrefixStore(me, store)
    while time.monotonic() < deadline:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{rank()}", me)
        if store.check([f"{attempt}/all"]) and me in store.get(f"{attempt}/all").decode():
            return dist.PrefixStore(attempt, store)
        time.sleep(JOIN_POLL_SECONDS)
    raise UserError(f"not all ranks have joined in {JOIN_SECONDS} s; look at what rank 0 says")


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor (in place)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def count_over_ranks(number: int) -> int:
    """The sum of the ranks' numbers. A collective."""
    return int(sum_over_ranks(torch.tensor(number)))


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


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks. A collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_on_main(value: Any) -> list[Any] | None:
    """Every rank's value on rank 0, in the order of the ranks; None on the others. A collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


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
    first = next((m for m in gathered(message) if m is not None), None)
    if first is not None:
        raise AgreedError(first) from error
