"""Which images make up which batch: a pure function of (seed, epoch, step) and of how the ranks share the work."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from utils.randomness import derive_seed

Key = tuple[int, int]
"""(epoch, index): what :class:`data.dataset.ImageDataset` takes."""


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Derive the order of the data set in ``epoch``, a permutation of ``range(size)``.

    numpy keeps the stream of this older generator the same in all versions.
    """
    return np.random.RandomState(derive_seed(seed, "order", epoch) & 0xFFFFFFFF).permutation(size)


class TrainBatches(Sampler[list[Key]]):
    """The micro-batches of one rank from step ``first_step`` to ``last_step`` (exclusive), over all their epochs.

    An epoch is one permutation of the data set, cut into global batches of ``batch_size * accumulation * world_size``;
    the remainder is left out. Of a global batch the rank takes its contiguous slice.
    """

    def __init__(self, size: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int):
        self.size = size
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.global_batch = batch_size * accumulation * world_size
        self.steps_per_epoch = size // self.global_batch
        self.seed = seed
        self.first_step = self.last_step = 0

    def order(self, epoch: int) -> np.ndarray:
        """Derive the images of an epoch, from whose beginning global batches are cut."""
        return epoch_order(self.seed, epoch, self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = -1
        for step in range(self.first_step, self.last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            start = step % self.steps_per_epoch * self.global_batch
            start += self.rank * self.batch_size * self.accumulation
            for micro_step in range(self.accumulation):
                micro_batch = order[start + micro_step * self.batch_size :][: self.batch_size]
                yield [(epoch, i) for i in micro_batch.tolist()]

    def global_batch_of(self, step: int) -> list[Key]:
        """List what all ranks together take in ``step``."""
        epoch, steps_into_epoch = divmod(step, self.steps_per_epoch)
        order = self.order(epoch)
        start = steps_into_epoch * self.global_batch
        return [(epoch, i) for i in order[start : start + self.global_batch].tolist()]

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
