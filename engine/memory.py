"""Batches that do not fit into the GPU's memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from utils.distributed import largest_over_ranks
from utils.errors import UserError


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


def parts_that_fit(train_on: Callable[[int], None], batch_size: int) -> int:
    """Into how many parts a batch must be cut: 1, 2, 4, ...; the same for all ranks. A collective.

    Args:
        train_on: forward and backward pass of so many images.
    """
    parts = 1
    while True:
        try:
            train_on(-(-batch_size // parts))
            break
        except torch.OutOfMemoryError:
            if parts >= batch_size:
                raise
        parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return largest_over_ranks(parts)
