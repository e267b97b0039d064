"""Batches on the device, in the order that a sampler gives."""

import signal
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.dataset import ImageDataset, collate
from data.sampling import EvalBatches, TrainBatches
from utils.errors import UserError


def _leave_ctrl_c_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_on_bad_image(line: str) -> None:
    """What to do with a file that cannot be decoded unless told otherwise."""
    raise UserError(f"image {line}; remove or mend it, or go on without it: --opts DATA.ON_BAD_IMAGE skip")


class _Loader:
    """Yields images ``(B, 3, H, W)`` and classes ``(B,)`` on the device."""

    def __init__(
        self,
        dataset: ImageDataset,
        batches: TrainBatches | EvalBatches,
        num_workers: int,
        device: torch.device,
        on_bad_image: Callable[[str], None] = stop_on_bad_image,
    ):
        self.dataset = dataset
        self.batches = batches
        self.device = device
        self.on_bad_image = on_bad_image
        self.skipped = 0
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            # Forked workers share the index; others would get a copy each
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            worker_init_fn=_leave_ctrl_c_to_the_main_process if num_workers else None,
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, bad, failure in self._loader:
            for line in bad:
                self.on_bad_image(line)
                self.skipped += 1
            if failure:
                raise UserError(f"image {failure}")
            if len(targets):
                images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                yield images, targets.to(self.device, non_blocking=True)


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
    """Every image once over all ranks."""
