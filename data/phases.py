"""Training batches of a run that changes them on the way: TRAIN.CURRICULUM."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from data.dataset import ImageDataset
from data.loading import Batch, TrainLoader
from utils.calendar import Calendar, Span


class PhasedLoader:
    """A :class:`data.loading.TrainLoader` that is another one in each phase of a run.

    At the border of two phases the loader processes of one end and those of the next begin.

    Args:
        phases: the epoch that each begins with, and its loader.
    """

    def __init__(self, phases: Sequence[tuple[int, TrainLoader]]):
        self.loaders = [loader for _, loader in phases]
        spans = [Span(epoch, loader.calendar.spans[0].steps_per_epoch, loader.global_batch) for epoch, loader in phases]
        self.calendar = Calendar(*spans)
        self._begins = [self.calendar.first_step(epoch) for epoch, _ in phases]
        for (epoch, loader), begins in zip(phases, self._begins, strict=True):
            loader.batches.begins = (epoch, begins)

    @property
    def global_batch(self) -> int:
        return self.calendar.global_batch

    @property
    def dataset(self) -> ImageDataset:
        """That of the last phase; all have the same images."""
        return self.loaders[-1].dataset

    @property
    def looked_at(self) -> int:
        return sum(loader.looked_at for loader in self.loaders)

    @property
    def turned(self) -> int:
        return sum(loader.turned for loader in self.loaders)

    @property
    def skipped(self) -> int:
        return sum(loader.skipped for loader in self.loaders)

    @skipped.setter
    def skipped(self, count: int) -> None:
        for loader in self.loaders:
            loader.skipped = 0
        self.loaders[0].skipped = count

    @property
    def on_bad_image(self) -> Callable[[str], None]:
        return self.loaders[0].on_bad_image

    @on_bad_image.setter
    def on_bad_image(self, tell: Callable[[str], None]) -> None:
        for loader in self.loaders:
            loader.on_bad_image = tell

    def global_batch_of(self, step: int) -> list[tuple[int, ...]]:
        """List what all ranks together take in ``step``."""
        return self._at(step).global_batch_of(step)

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of each step from ``first_step`` to ``last_step`` (exclusive)."""
        ends = [*self._begins[1:], last_step]
        parts = (
            loader.micro_batches(max(begins, first_step), min(ends_at, last_step))
            for loader, begins, ends_at in zip(self.loaders, self._begins, ends, strict=True)
            if begins < last_step and ends_at > first_step
        )
        return chain.from_iterable(parts)

    def _at(self, step: int) -> TrainLoader:
        return self.loaders[max(i for i, begins in enumerate(self._begins) if begins <= step)]
