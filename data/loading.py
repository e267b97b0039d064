"""Batches on the device, in the order that a sampler gives."""

import atexit
import multiprocessing
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.augmentation import DeviceStage
from data.dataset import BatchDataset, HostBatch, ImageDataset, map_tensors
from data.ring import Ring, Slot
from data.sampling import EvalBatches, TrainBatches
from utils.calendar import Calendar, Span
from utils.distributed import count_over_ranks
from utils.errors import UserError
from utils.processes import STOP_SIGNALS, begin_worker

if TYPE_CHECKING:
    from data.phases import PhasedLoader

PREFETCH_FACTOR = 2
"""Batches that each loader process works ahead."""
BATCHES_IN_USE = 2
"""One that is used, and one that is copied to the device meanwhile."""

warnings.filterwarnings("ignore", message="This DataLoader will create")  # DATA.NUM_WORKERS is the user's choice


class Batch(NamedTuple):
    """What a task gets of a loader.

    Attributes:
        images: ``(B, 3, H, W)`` float, channels last, on the device; or a list of ``(3, H, W)`` of any sizes.
        targets: ``(B, ...)`` on the device: the samples' targets; or a list of them, which may be dicts of tensors.
        numbers: ``(B,)`` int64 on the host: the places of the images in the index.
    """

    images: Tensor | list[Tensor]
    targets: Tensor | list[Tensor] | list[dict[str, Tensor]]
    numbers: Tensor


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # what is sent to a whole group is for the main process to answer
    begin_worker()


def stop_on_bad_image(line: str) -> None:
    """Raise an error about an image that cannot be decoded: what a loader does unless told otherwise."""
    raise UserError(f"image {line}; remove or mend it, or go on without it: --opts DATA.ON_BAD_IMAGE skip")


_workers: "weakref.WeakSet[multiprocessing.process.BaseProcess]" = weakref.WeakSet()
"""Loader processes of this one."""


def _end_workers() -> None:
    """End the workers of loaders that were left unfinished: later multiprocessing would ask them to end, and wait."""
    for worker in _workers:
        if worker.is_alive():
            worker.kill()


atexit.register(_end_workers)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Name a loader process that has died: torch raises an error in the main process then, wherever that is.

    Raises:
        UserError: instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        dead, status = next(((worker, worker.exitcode) for worker in _workers if worker.exitcode), (None, 0))
        if dead is None:
            raise
        how = f"status {status}" if status > 0 else signal.Signals(-status).name
        raise UserError(
            f"a loader process has died (process {dead.pid}, {how}): for want of memory, perhaps; "
            "use a smaller DATA.NUM_WORKERS, and see what the system's log says"
        ) from error


class _Loader:
    """Yields batches on the device.

    Args:
        dataset: what the workers make samples of.
        batches: which images make up which batch.
        num_workers: loader processes; 0 does all in this one.
        size: height and width of every image; None for images of any sizes.
        stage: makes float images on its ``device`` of uint8 images and their plans.
        on_bad_image: is given a line for each image that cannot be decoded.

    Attributes:
        skipped: how many images could not be decoded so far.
        looked_at, turned: how many images of the first epoch there were, and how many of them EXIF says are turned.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batches: TrainBatches | EvalBatches,
        num_workers: int,
        size: tuple[int, int] | None,
        stage: DeviceStage,
        on_bad_image: Callable[[str], None] = stop_on_bad_image,
    ):
        self.dataset = dataset
        self.batches = batches
        self.size = size
        self.stage = stage
        self.on_bad_image = on_bad_image
        self.skipped = 0
        self.looked_at = self.turned = 0
        self.num_workers = num_workers

    @property
    def device(self) -> torch.device:
        return self.stage.device

    def __iter__(self) -> Iterator[Batch]:
        return _one_ahead(self._sound_batches(), self._to_device, self.device)

    def _host_batches(self) -> Iterator[HostBatch]:
        """Start the workers and yield what they send. Images are valid until the next batch but one is asked for."""
        forks = self.num_workers > 0 and sys.platform == "linux"
        ring = None
        if forks and self.size:
            blocks = PREFETCH_FACTOR * self.num_workers + BATCHES_IN_USE
            ring = Ring(blocks, (self.batches.batch_size, *self.size, 3))
        loader = DataLoader(
            BatchDataset(self.dataset, ring, any_size=self.size is None),
            batch_size=None,  # the sampler's items are whole batches, with their numbers
            sampler=enumerate(self.batches),
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
        images: Tensor | list[Tensor]
        targets: Any
        for batch in batches:
            if isinstance(batch.images, list):
                images = [torch.as_tensor(x) for x in batch.images]
                targets = [map_tensors(torch.as_tensor, target) for target in batch.targets]
            else:
                images = batch.images.images() if isinstance(batch.images, Slot) else batch.images
                targets = torch.as_tensor(batch.targets)
            yield replace(batch, images=images, targets=targets)

    def _sound_batches(self) -> Iterator[HostBatch]:
        for batch in self._host_batches():
            for line in batch.bad:
                self.on_bad_image(line)
                self.skipped += 1
            self.looked_at += sum(orientation > 0 for orientation in batch.orientations)
            self.turned += sum(orientation > 1 for orientation in batch.orientations)
            if batch.failure:
                raise UserError(batch.failure)
            if batch.numbers:
                yield batch

    def _to_device(self, batch: HostBatch) -> Batch:
        images: Tensor | list[Tensor]
        if isinstance(batch.images, list):
            images = [self.stage(x[None], [plan])[0] for x, plan in zip(batch.images, batch.plans, strict=True)]
            targets = [map_tensors(lambda x: x.to(self.device, non_blocking=True), target) for target in batch.targets]
        else:
            images = self.stage(batch.images, batch.plans)
            targets = batch.targets.to(self.device, non_blocking=True)
        return Batch(images, targets, torch.tensor(batch.numbers))


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the one stream of all loaders: memory that was freed on one stream is of no use to another."""
    return torch.cuda.Stream(device)


def _one_ahead(
    batches: Iterator[HostBatch], to_device: Callable[[HostBatch], Batch], device: torch.device
) -> Iterator[Batch]:
    """Copy and prepare each batch on a stream of its own while the one before it is in use."""
    if device.type != "cuda":
        yield from map(to_device, batches)
        return
    stream = _copy_stream(device)
    ready = None
    for host_batch in batches:
        with torch.cuda.stream(stream):
            batch = to_device(host_batch)
        event = stream.record_event()
        if ready:
            yield _handed_over(*ready)
        ready = batch, event
    if ready:
        yield _handed_over(*ready)


def _handed_over(batch: Batch, event: torch.cuda.Event) -> Batch:
    """Let the current stream wait for the batch, and the memory of the batch wait for the current stream."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for some in (batch.images, batch.targets):
        for one in some if isinstance(some, list) else [some]:
            for tensor in one.values() if isinstance(one, dict) else [one]:
                tensor.record_stream(current)
    return batch


class TrainLoader(_Loader):
    """Yields the micro-batches of this rank. One pass over :meth:`micro_batches` lasts the whole run."""

    batches: TrainBatches

    @property
    def calendar(self) -> Calendar:
        return Calendar(Span(0, self.batches.steps_per_epoch, self.batches.global_batch))

    @property
    def global_batch(self) -> int:
        return self.batches.global_batch

    def global_batch_of(self, step: int) -> list[tuple[int, ...]]:
        """List what all ranks together take in ``step``."""
        return self.batches.global_batch_of(step)

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield ``accumulation`` batches for each step from ``first_step`` to ``last_step`` (exclusive)."""
        self.batches.first_step, self.batches.last_step = first_step, last_step
        return iter(self)


class EvalLoader(_Loader):
    """Yields every image once over all ranks."""

    batches: EvalBatches

    def __len__(self) -> int:
        """Count the batches of this rank."""
        return len(self.batches)


def describe_turned(loader: "TrainLoader | EvalLoader | PhasedLoader", upright: bool) -> str:
    """Say how many images of the first pass EXIF says are turned; empty for none. A collective.

    Args:
        upright: whether DATA.UPRIGHT has turned them.
    """
    looked_at, turned = count_over_ranks(loader.looked_at), count_over_ranks(loader.turned)
    if not turned:
        return ""
    done = "they were" if upright else "they were not: DATA.UPRIGHT True does so"
    return f"EXIF says of {turned:,} of {looked_at:,} images that they are to be turned or mirrored; {done}"
