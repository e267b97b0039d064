"""Which images make up which batch: a pure function of (seed, epoch, step) and of how the ranks share the work."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from utils.randomness import derive_seed

Key = tuple[int, ...]
"""(epoch, index), or (epoch, index, n) for the n-th further time that the image comes in the epoch: what
:class:`data.dataset.ImageDataset` takes."""


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Derive the order of the data set in ``epoch``, a permutation of ``range(size)``.

    numpy keeps the stream of this older generator the same in all versions.
    """
    return np.random.RandomState(derive_seed(seed, "order", epoch) & 0xFFFFFFFF).permutation(size)


class TrainBatches(Sampler[list[Key]]):
    """The micro-batches of one rank from step ``first_step`` to ``last_step`` (exclusive), over all their epochs.

    An epoch is one permutation of the data set, cut into global batches of ``batch_size * accumulation * world_size``;
    the remainder is left out. Of a global batch the rank takes its contiguous slice.

    With ``repeats`` each image comes so many times in a row, augmented anew each time, and an epoch, which is as long
    as without, has the first images of its permutation alone. Source: repeated augmentation, arXiv 1901.09335.

    Attributes:
        begins: an epoch and its first step, from which on steps are counted.
    """

    def __init__(
        self, size: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int, repeats: int = 1
    ):
        self.size = size
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.global_batch = batch_size * accumulation * world_size
        self.steps_per_epoch = size // self.global_batch
        self.seed, self.repeats = seed, repeats
        self.first_step = self.last_step = 0
        self.begins = 0, 0

    def order(self, epoch: int) -> np.ndarray:
        """Derive the images of an epoch, from whose beginning global batches are cut."""
        return epoch_order(self.seed, epoch, self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = -1
        for step in range(self.first_step, self.last_step):
            now, steps_into_epoch = self.epoch_of(step)
            if now != epoch:
                epoch, order = now, self.order(now)
            start = steps_into_epoch * self.global_batch
            start += self.rank * self.batch_size * self.accumulation
            for micro_step in range(self.accumulation):
                yield self._keys(epoch, order, start + micro_step * self.batch_size, self.batch_size)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """Give the epoch of a step, and how many steps of it are before."""
        first_epoch, first_step = self.begins
        epochs, steps_into_epoch = divmod(step - first_step, self.steps_per_epoch)
        return first_epoch + epochs, steps_into_epoch

    def _keys(self, epoch: int, order: np.ndarray, start: int, count: int) -> list[Key]:
        places = range(start, start + count)
        if self.repeats == 1:
            return [(epoch, i) for i in order[start : start + count].tolist()]
        return [(epoch, int(order[p // self.repeats]), *filter(None, [p % self.repeats])) for p in places]

    def global_batch_of(self, step: int) -> list[Key]:
        """List what all ranks together take in ``step``."""
        epoch, steps_into_epoch = self.epoch_of(step)
        return self._keys(epoch, self.order(epoch), steps_into_epoch * self.global_batch, self.global_batch)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation


class BalancedTrainBatches(TrainBatches):
    """Batches in which each class is drawn equally often: of rare ones an image comes several times an epoch.

    An epoch has as many places as there are images. They go round the classes, in a new order each round, and round
    the images of each class likewise, so that no class is ahead of another by more than one.

    Args:
        labels: the class of each image, ``(N,)``.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int):
        super().__init__(len(labels), batch_size, accumulation, rank, world_size, seed)
        self.images = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def order(self, epoch: int) -> np.ndarray:
        generator = np.random.RandomState(derive_seed(self.seed, "balanced order", epoch) & 0xFFFFFFFF)
        rounds = -(-self.size // len(self.images))
        of_classes = []
        for images in self.images:
            times = -(-rounds // len(images))
            of_classes.append(np.concatenate([generator.permutation(images) for _ in range(times)])[:rounds])
        turns = np.stack([generator.permutation(len(self.images)) for _ in range(rounds)])
        return np.stack(of_classes)[turns, np.arange(rounds)[:, None]].ravel()[: self.size]


class GroupedTrainBatches(TrainBatches):
    """Micro-batches of one group of images each, wide or tall ones, say. Source: the published detection recipes.

    Of an epoch's permutation each group takes its images, and has a micro-batch whenever there are ``batch_size`` of
    them; the last ones of each group are left out, and of the micro-batches the remainder.

    Args:
        groups: the group of each image, ``(N,)``.
    """

    def __init__(self, groups: np.ndarray, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int):
        super().__init__(len(groups), batch_size, accumulation, rank, world_size, seed)
        self.groups = groups
        _, counts = np.unique(groups, return_counts=True)
        self.steps_per_epoch = int((counts // batch_size).sum()) // (accumulation * world_size)

    def order(self, epoch: int) -> np.ndarray:
        order = super().order(epoch)
        groups, filled, micro_batches = self.groups[order], [], []
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            whole = places[: len(places) // self.batch_size * self.batch_size].reshape(-1, self.batch_size)
            filled.append(whole[:, -1])
            micro_batches.append(order[whole])
        return np.concatenate(micro_batches)[np.argsort(np.concatenate(filled))].ravel()


class EvalBatches(Sampler[list[Key]]):
    """Every image exactly once over all ranks: rank r takes r, r + world_size, ...; nothing is padded or dropped."""

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int):
        self.mine = range(rank, size, world_size)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [(0, i) for i in self.mine[start : start + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)
