"""Batches on the device, in the order that a sampler gives."""

import atexit
import multiprocessing
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from data.dataset import Batch, BatchDataset, ImageDataset
from data.on_device import DeviceStage
from data.ring import Ring, Slot
from data.sampling import EvalBatches, Key, TrainBatches
from utils.errors import UserError
from utils.processes import STOP_SIGNALS, end_with_parent

PREFETCH_FACTOR = 2
"""Batches that each loader process works ahead."""
BATCHES_IN_USE = 2
"""One that is used, and one that is copied to the device meanwhile."""


class _Numbered(Sampler[tuple[int, list[Key]]]):
    """Batches with their numbers."""

    def __init__(self, batches: TrainBatches | EvalBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[int, list[Key]]]:
        return enumerate(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _start_worker(worker: int) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # what is sent to a whole group is for the main process to answer
    end_with_parent(signal.SIGKILL)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a live bar's stand-ins hold a lock that was copied locked
    torch.set_num_threads(1)


def stop_on_bad_image(line: str) -> None:
    """What to do with a file that cannot be decoded unless told otherwise."""
    raise UserError(f"image {line}; remove or mend it, or go on without it: --opts DATA.ON_BAD_IMAGE skip")


_workers: "weakref.WeakSet[multiprocessing.Process]" = weakref.WeakSet()
"""Loader processes of this one."""


def _end_workers() -> None:
    """At the end of a process that has left a loader unfinished. Later multiprocessing would ask them and wait."""
    for worker in _workers:
        if worker.is_alive():
            worker.kill()


atexit.register(_end_workers)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """torch raises an error of its own in the main process, wherever that is, when a loader process has died."""
    try:
        yield
    except RuntimeError as error:
        dead = next((worker for worker in _workers if worker.exitcode), None)
        if dead is None:
            raise
        how = f"status {dead.exitcode}" if dead.exitcode > 0 else signal.Signals(-dead.exitcode).name
        raise UserError(
            f"a loader process has died (process {dead.pid}, {how}): for want of memory, perhaps; "
            "use a smaller DATA.NUM_WORKERS, and see what the system's log says"
        ) from error


class _Loader:
    """Yields normalised images ``(B, 3, H, W)`` and classes ``(B,)`` on the device.

    The workers make uint8 images; ``device_stage`` does the rest.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batches: TrainBatches | EvalBatches,
        num_workers: int,
        device_stage: DeviceStage,
        on_bad_image: Callable[[str], None] = stop_on_bad_image,
    ):
        self.dataset = dataset
        self.batches = batches
        self.device_stage = device_stage
        self.on_bad_image = on_bad_image
        self.skipped = 0
        self.looked_at = self.turned = 0  # images of the first epoch, and those of them that EXIF says are turned
        self.num_workers = num_workers

    @property
    def device(self) -> torch.device:
        return self.device_stage.device

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return _one_ahead(self._sound_batches(), self._to_device, self.device)

    def host_batches(self) -> Iterator[Batch]:
        """What the workers make of the files. The images of a batch are valid until the next but one is asked for."""
        forks = self.num_workers > 0 and sys.platform == "linux"
        ring = None
        if forks:
            height, width = self.dataset.transform.size
            blocks = PREFETCH_FACTOR * self.num_workers + BATCHES_IN_USE
            ring = Ring(blocks, (self.batches.batch_size, height, width, 3))
        loader = DataLoader(
            BatchDataset(self.dataset, ring),
            batch_size=None,  # the sampler's items are whole batches
            sampler=_Numbered(self.batches),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH_FACTOR if self.num_workers else None,
            pin_memory=self.device.type == "cuda",
            # Forked workers share the index and the ring; others would map the index once more
            multiprocessing_context="fork" if forks else None,
            worker_init_fn=_start_worker if self.num_workers else None,
        )
        others = set(multiprocessing.active_children())
        batches = iter(loader)
        _workers.update(set(multiprocessing.active_children()) - others)
        for batch in batches:
            images = batch.images.images() if isinstance(batch.images, Slot) else batch.images
            yield batch._replace(images=images, targets=torch.as_tensor(batch.targets))

    def _sound_batches(self) -> Iterator[Batch]:
        for batch in self.host_batches():
            for line in batch.report.bad:
                self.on_bad_image(line)
                self.skipped += 1
            self.looked_at += sum(orientation > 0 for orientation in batch.report.orientations)
            self.turned += sum(orientation > 1 for orientation in batch.report.orientations)
            if batch.report.failure:
                raise UserError(batch.report.failure)
            if len(batch.targets):
                yield batch

    def _to_device(self, batch: Batch) -> tuple[Tensor, ...]:
        targets = batch.targets.pin_memory() if self.device.type == "cuda" else batch.targets
        return self.device_stage(batch.images, batch.report.plans), targets.to(self.device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders: memory that was freed on one stream is of no use to another."""
    return torch.cuda.Stream(device)


def _one_ahead(
    batches: Iterator[Batch], to_device: Callable[[Batch], tuple[Tensor, ...]], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Copy and prepare each batch on a stream of its own while the one before it is in use."""
    if device.type != "cuda":
        yield from map(to_device, batches)
        return
    stream = _copy_stream(device)
    ready = None
    for batch in batches:
        with torch.cuda.stream(stream):
            tensors = to_device(batch)
        event = stream.record_event()
        if ready:
            yield _handed_over(*ready)
        ready = tensors, event
    if ready:
        yield _handed_over(*ready)


def _handed_over(tensors: tuple[Tensor, ...], event: torch.cuda.Event) -> tuple[Tensor, ...]:
    """Let the current stream wait for the tensors, and their memory wait for the current stream."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in tensors:
        tensor.record_stream(current)
    return tensors


class TrainLoader(_Loader):
    """The micro-batches of this rank. One pass over :meth:`micro_batches` lasts the whole run."""

    batches: TrainBatches

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def global_batch(self) -> int:
        return self.batches.global_batch

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``accumulation`` batches for each step from ``first_step`` to ``last_step`` (exclusive)."""
        self.batches.first_step, self.batches.last_step = first_step, last_step
        return iter(self)


class EvalLoader(_Loader):
    """Every image once over all ranks; a batch has the images' numbers in the index ``(B,)`` besides."""

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        numbers = torch.tensor(batch.report.numbers)
        numbers = numbers.pin_memory() if self.device.type == "cuda" else numbers
        return *super()._to_device(batch), numbers.to(self.device, non_blocking=True)
