"""Which step belongs to which epoch, where a run may take batches of another size from some epoch on."""

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple


class Span(NamedTuple):
    """Epochs with the same batches, until the next span begins.

    Attributes:
        first_epoch: counts from 0.
        steps_per_epoch: of each of them.
        global_batch: images of a step, over all processes.
    """

    first_epoch: int
    steps_per_epoch: int
    global_batch: int


class Calendar:
    """The epochs of a run by their steps.

    Args:
        spans: in their order; the first begins with epoch 0, the last goes on without end.
    """

    def __init__(self, *spans: Span):
        self.spans = spans
        self._first_steps = [0]
        for span, later in pairwise(spans):
            epochs = later.first_epoch - span.first_epoch
            self._first_steps.append(self._first_steps[-1] + epochs * span.steps_per_epoch)

    @property
    def is_even(self) -> bool:
        """Whether all epochs have as many steps, of as many images."""
        return len({span[1:] for span in self.spans}) == 1

    @property
    def global_batch(self) -> int:
        """Images of a step of the last span: that which the settings are for."""
        return self.spans[-1].global_batch

    def global_batch_at(self, step: int) -> int:
        """Images of the step with this number."""
        return self._span_of(step)[0].global_batch

    def epoch_of(self, step: int) -> tuple[int, int]:
        """Give the epoch of a step, and how many steps of it are before."""
        span, first_step = self._span_of(step)
        epochs, into = divmod(step - first_step, span.steps_per_epoch)
        return span.first_epoch + epochs, into

    def first_step(self, epoch: int) -> int:
        """Give the number of the first step of an epoch, which is how many steps the epochs before it take."""
        number = bisect_right([span.first_epoch for span in self.spans], epoch) - 1
        span = self.spans[number]
        return self._first_steps[number] + (epoch - span.first_epoch) * span.steps_per_epoch

    def ends_epoch(self, steps: int) -> bool:
        """Tell whether an epoch is over after so many steps."""
        return self.epoch_of(steps)[1] == 0

    def until(self, steps: int) -> tuple[Span, ...]:
        """Give the spans that have begun before so many steps are done."""
        return tuple(span for span, first in zip(self.spans, self._first_steps, strict=True) if first < steps)

    def _span_of(self, step: int) -> tuple[Span, int]:
        number = bisect_right(self._first_steps, step) - 1
        return self.spans[number], self._first_steps[number]
