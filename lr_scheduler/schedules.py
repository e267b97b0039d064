"""Learning-rate schedules: pure functions of the step, which counts from 0. Source: the published recipe."""

import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


def cosine(base_lr: float, min_lr: float, total_steps: int) -> Schedule:
    """Half a cosine from ``base_lr`` at step 0 to ``min_lr`` at ``total_steps``; a warm-up hides its beginning."""
    return lambda step: min_lr + 0.5 * (base_lr - min_lr) * (1 + math.cos(math.pi * min(step / total_steps, 1)))


def linear(base_lr: float, min_lr: float, total_steps: int, warmup_steps: int) -> Schedule:
    """A straight line from ``base_lr`` at ``warmup_steps`` to ``min_lr`` at ``total_steps``."""
    return lambda step: base_lr + (min_lr - base_lr) * (step - warmup_steps) / (total_steps - warmup_steps)


def constant(base_lr: float, min_lr: float, total_steps: int, cooldown_steps: int) -> Schedule:
    """``base_lr``, then for the last ``cooldown_steps`` down to ``min_lr``, as 1 minus the root of the share gone.

    A run can be made longer as long as it has not begun to cool down. Source: arXiv 2405.18392, equation 1.
    """
    begins = total_steps - cooldown_steps

    def rate(step: int) -> float:
        gone = min(max(step - begins, 0) / cooldown_steps, 1) if cooldown_steps else 0.0
        return base_lr - (base_lr - min_lr) * math.sqrt(gone)

    return rate


def one_cycle(warmup_lr: float, base_lr: float, min_lr: float, total_steps: int, warmup_steps: int) -> Schedule:
    """Half a cosine up from ``warmup_lr`` to ``base_lr`` in ``warmup_steps``, and one down to ``min_lr`` at the end.

    Source: arXiv 1708.07120, with cosines as torch has it.
    """

    def rate(step: int) -> float:
        if step < warmup_steps:
            low, height = warmup_lr, step / warmup_steps
        else:
            low, height = min_lr, 1 - min((step - warmup_steps) / (total_steps - warmup_steps), 1)
        return low + 0.5 * (base_lr - low) * (1 - math.cos(math.pi * height))

    return rate


def restarts(base_lr: float, min_lr: float, first_steps: int, growth: float, decay: float) -> Schedule:
    """Half a cosine from ``base_lr`` to ``min_lr`` in ``first_steps``, and again, ``growth`` times as long each time.

    It begins with ``decay`` times the rate of the time before. Source: arXiv 1608.03983, equation 5.
    """

    def rate(step: int) -> float:
        begins, length, top = 0, first_steps, base_lr
        while step >= begins + length:
            begins, length, top = begins + length, max(round(length * growth), 1), top * decay
        return min_lr + 0.5 * (max(top, min_lr) - min_lr) * (1 + math.cos(math.pi * (step - begins) / length))

    return rate


def step_decay(base_lr: float, decay_rate: float, decay_steps: int, warmup_steps: int) -> Schedule:
    """``base_lr``, multiplied by ``decay_rate`` after every ``decay_steps`` that follow the warm-up."""
    return lambda step: base_lr * decay_rate ** ((step - warmup_steps) // decay_steps)


def with_warmup(schedule: Schedule, warmup_lr: float, base_lr: float, warmup_steps: int) -> Schedule:
    """A straight line from ``warmup_lr`` to ``base_lr`` for ``warmup_steps``, then ``schedule`` where it has got to."""
    return lambda step: (
        warmup_lr + (base_lr - warmup_lr) * step / warmup_steps if step < warmup_steps else schedule(step)
    )


def poly(base_lr: float, min_lr: float, total_steps: int, power: float) -> Schedule:
    """From ``base_lr`` at step 0 to ``min_lr`` at ``total_steps`` as the share of steps that are left, to a power."""
    return lambda step: min_lr + (base_lr - min_lr) * max(1 - step / total_steps, 0) ** power


def multistep(base_lr: float, decay_rate: float, decay_at: Sequence[int]) -> Schedule:
    """``base_lr``, multiplied by ``decay_rate`` at each step of ``decay_at``."""
    return lambda step: base_lr * decay_rate ** sum(step >= at for at in decay_at)


def with_factor(schedule: Schedule, ratio: float, warmup_steps: int) -> Schedule:
    """``schedule`` times a factor that grows linearly from ``ratio`` to 1 in ``warmup_steps``."""
    return lambda step: schedule(step) * (1 if step >= warmup_steps else 1 - (1 - step / warmup_steps) * (1 - ratio))
