"""The processes of a run. Everything here also works without a launcher, as one process."""

import os
import pickle
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from utils.errors import UserError
from utils.launchers import gpu_of_this_process
from utils.processes import USER_ERROR_STATUS, place

JOIN_SECONDS = 600
"""How long ranks wait for each other when they start; a slow host may take minutes to import torch."""
JOIN_POLL_SECONDS = 0.02
SECONDS_BETWEEN_LOOKS = 1.0
UNREACHABLE = "cannot connect"
DAYS_WITHOUT_LIMIT = 365
_store: dist.Store | None = None
_is_ours = False
_hosts: list[str] = [socket.gethostname()]
_places: list[str] = []
"""Of each rank, the machine and the container in it."""
_made = 0
Made = TypeVar("Made")
OF_THE_NETWORK = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)
"""How errors read of which torch has no class of their own."""


class AgreedError(UserError):
    """A :class:`UserError` that every rank has raised; only rank 0 needs to print it."""


class PeerLostError(Exception):
    """Another process of the run is gone, or the network to it; the message says which."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number the processes of a host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def start(hang_minutes: float = 0.0) -> torch.device:
    """Join the other processes that a launcher has started, if any, and choose this one's device.

    Args:
        hang_minutes: TRAIN.HANG_MINUTES, after which the watchdog ends a run; torch gives up later than that. 0: never.

    Raises:
        UserError: there is no GPU for this process, another has the same one, or the others cannot be reached; or a
            group that somebody else has brought together is not one for this.
    """
    global _store, _hosts, _places, _is_ours
    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of_this_process(local_rank(), torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if dist.is_initialized():  # by whoever has imported this, as Ray does
        _check_group_of_others(device)
    elif world_size() > 1:
        _is_ours = True
        _store = _store_of_this_attempt()
        if device.type == "cuda":
            _check_no_other_has(_store, device)
        connected = threading.Event()
        threading.Thread(target=_end_with_others, args=[_store, connected], daemon=True).start()
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=_store,
                rank=rank(),
                world_size=world_size(),
                timeout=timedelta(minutes=2 * hang_minutes) if hang_minutes else timedelta(days=DAYS_WITHOUT_LIMIT),
                device_id=device if device.type == "cuda" else None,
            )
        except RuntimeError as error:
            said = _unreachable(error, device)
            with suppress(RuntimeError):
                _store.set(UNREACHABLE, said)
            raise UserError(said) from error
        finally:
            connected.set()
    if dist.is_initialized():
        _hosts, _places = map(
            list, zip(*gathered((socket.gethostname(), f"{socket.gethostname()} {place()}")), strict=True)
        )
    return device


def _check_group_of_others(device: torch.device) -> None:
    """Refuse a group that cannot carry what the ranks send, or in which they have other numbers."""
    said, there = (rank(), world_size()), (dist.get_rank(), dist.get_world_size())
    if said != there:
        raise UserError(
            f"RANK and WORLD_SIZE say rank {said[0]} of {said[1]}, but the process group has it as rank {there[0]} of "
            f"{there[1]}; set both, and LOCAL_RANK, as the group has them"
        )
    backends = dist.get_backend_config()
    missing = [kind for kind in ("cpu", device.type) if f"{kind}:" not in backends]
    if missing:
        raise AgreedError(
            f"the process group cannot send what is on the {missing[0]} (its backend is {backends}); give it the "
            'backend "cpu:gloo,cuda:nccl", as in Ray\'s TorchConfig(backend="cpu:gloo,cuda:nccl")'
        )


def _end_with_others(store: dist.Store, connected: threading.Event) -> None:
    """End this process when another one cannot connect, for which torch would wait for hours."""
    while not connected.wait(SECONDS_BETWEEN_LOOKS):
        with suppress(RuntimeError):
            if store.check([UNREACHABLE]) and not connected.wait(SECONDS_BETWEEN_LOOKS):
                print(f"error (rank {rank()}): {store.get(UNREACHABLE).decode()}", file=sys.stderr, flush=True)
                os._exit(USER_ERROR_STATUS)


def _check_no_other_has(store: dist.Store, device: torch.device) -> None:
    """Refuse to share a GPU, which NCCL does in words that few understand."""
    gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    if store.add(f"processes on {gpu}", 1) > 1:
        raise UserError(
            f"rank {rank()} and another share a GPU of {gpu}: start one process for a GPU (--nproc_per_node, "
            "--ntasks-per-node), and let each see its own or all (--gpus-per-task 1, or none)"
        )


def _unreachable(error: RuntimeError, device: torch.device) -> str:
    """Say that this process reaches no other, and what chooses the network."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    names = ["GLOO_SOCKET_IFNAME"] + ["NCCL_SOCKET_IFNAME"] * (device.type == "cuda")
    chosen = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    interfaces = ", ".join(name for _, name in socket.if_nameindex())
    now = f" (now {chosen[0]})" if chosen else ""
    host = socket.gethostname()
    return (
        f"rank {rank()} on {host} cannot connect to the others ({reason}): name the network interface "
        f"that reaches them in {' and '.join(names)}{now}; {host} has {interfaces}"
    )


def name_of(rank: int) -> str:
    """Name a rank and its host, for people."""
    return f"rank {rank} on {_hosts[rank]}" if rank < len(_hosts) else f"rank {rank}"


def hosts() -> list[str]:
    """Give the host of each rank."""
    return _hosts


def describe_hosts() -> str:
    """Say how many processes each host has; empty for a single host."""
    counts = {host: _hosts.count(host) for host in dict.fromkeys(_hosts)}
    return f"processes: {', '.join(f'{count} on {host}' for host, count in counts.items())}" if len(counts) > 1 else ""


def processes_of_each_host() -> int | None:
    """Count the processes of a host; None where hosts differ in that, or their ranks do not follow each other."""
    counts = [len([*together]) for _, together in groupby(_places)]
    return counts[0] if len({*counts}) == 1 and len(counts) == len({*_places}) else None


def is_of_the_network(error: BaseException) -> bool:
    """Tell whether an error may come of another process's end."""
    if isinstance(error, UserError):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(OF_THE_NETWORK.search(str(error)))
    )


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
    """Leave the other processes, unless somebody else has brought them together."""
    global _store, _is_ours
    if _is_ours and dist.is_initialized():
        dist.destroy_process_group()
        _store, _is_ours = None, False


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


def once_a_host(make: Callable[[], Made]) -> Made:
    """Let one process of each host make something, and give a copy to the others there, or the error that it met.

    No collective, but the processes of a host must call it in the same order. What is made must be picklable.

    Raises:
        UserError: of ``make``.
    """
    global _made
    maker = _places.index(_places[rank()]) if _store else rank()
    if _store is None or _places.count(_places[maker]) == 1:
        return make()
    _made += 1
    key = f"thing {_made} of rank {maker}"
    if maker == rank():
        try:
            made = make()
        except UserError as error:
            cast(Any, _store).set(key, pickle.dumps(error))
            raise
        cast(Any, _store).set(key, pickle.dumps(made))
        return made
    while not _store.check([key]):  # not get(), which gives up where a list of millions of files takes its time
        time.sleep(JOIN_POLL_SECONDS)
    made = pickle.loads(_store.get(key))
    if isinstance(made, UserError):
        raise made
    return made


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
