"""Batches that do not fit into the GPU's memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from config import Config
from engine.model import check_smallest_batch
from engine.precision import Precision
from engine.state import TrainState
from engine.step import TrainStep
from tasks import Task
from utils.distributed import largest_over_ranks
from utils.errors import UserError

Value = TypeVar("Value")


@contextmanager
def naming_out_of_memory() -> Iterator[None]:
    """What a user can do about it, in place of torch's account of its allocator."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small for this batch: --opts TRAIN.AUTO_MICRO_BATCH True cuts it into parts that "
            "fit; or halve --batch-size and double --accumulation-steps, or set TRAIN.USE_CHECKPOINT selective"
        ) from error


def parts_that_fit(config: Config, task: Task, state: TrainState, precision: Precision) -> int:
    """Into how many parts a micro-batch must be cut to fit, tried out on a synthetic one; nothing of ``state`` changes.

    The same for all ranks. A collective.
    """
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]  # BatchNorm must not take note of it

    def try_parts(parts: int) -> None:
        check_smallest_batch(config, state.model, -(-config.DATA.BATCH_SIZE // parts))
        step = TrainStep(task, state.model, state.optimizer, state.scaler, precision, seed=config.SEED, parts=parts)
        try:
            step.accumulate(0, iter([task.synthetic_batch(config.DATA.BATCH_SIZE)]))
        finally:
            state.optimizer.zero_grad()
            for buffer, before in buffers:
                buffer.copy_(before)

    return fewest_parts(try_parts, config.DATA.BATCH_SIZE)


def fewest_parts(try_parts: Callable[[int], None], most: int) -> int:
    """The first of 1, 2, 4, ... parts for which memory suffices, largest of all ranks. A collective.

    Args:
        try_parts: computes so many parts, or raises torch's error.
        most: the error counts when so many are too few.
    """

    def fits(parts: int) -> bool:
        try_parts(parts)
        return True

    parts = 1
    while parts < most and not within_memory(partial(fits, parts)):
        parts *= 2
    if parts >= most:
        try_parts(parts)
    return largest_over_ranks(parts)


def within_memory(run: Callable[[], Value]) -> Value | None:
    """What ``run`` returns, or None when memory does not suffice for it."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # so says the CPU's allocator
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # here, where the error no longer holds on to what was computed
    return None
