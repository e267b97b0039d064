"""Memory for the batches that are on their way from the loader processes, allocated once and used in turn.

A fresh block of shared memory for each batch, as collating usually makes, costs a page fault every 4 KiB on both
sides: a seventh of the time that an image takes. Nor is this memory limited by the size of /dev/shm.
"""

import itertools
import mmap
from math import prod
from typing import ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor


class Ring:
    """``blocks`` blocks for batches of uint8 images ``(B, H, W, 3)``, shared with processes that are forked later.

    Whoever uses it sees to it that no more batches than that are under way at a time.
    """

    _numbers = itertools.count()
    _all: ClassVar[WeakValueDictionary[int, "Ring"]] = WeakValueDictionary()

    def __init__(self, blocks: int, shape: tuple[int, int, int, int]):
        self.number = next(self._numbers)
        memory = mmap.mmap(-1, blocks * prod(shape))
        self.blocks = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8).reshape(blocks, *shape))
        self._all[self.number] = self

    def __len__(self) -> int:
        return len(self.blocks)


class Slot(NamedTuple):
    """The first ``count`` images of a block: what is sent from process to process in their place."""

    ring: int
    block: int
    count: int  # type: ignore[assignment]  # a tuple's method of that name is not needed

    def images(self) -> Tensor:
        """View the images ``(B, 3, H, W)``, channels last, valid until the ring comes round to this block again."""
        return Ring._all[self.ring].blocks[self.block, : self.count].permute(0, 3, 1, 2)

    def pin_memory(self) -> Tensor:
        """Copy the images into page-locked memory."""
        return self.images().pin_memory()
