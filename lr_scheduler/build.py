"""From a config to a learning-rate schedule."""

from lr_scheduler.schedules import (
    Schedule,
    constant,
    cosine,
    linear,
    multistep,
    one_cycle,
    poly,
    restarts,
    step_decay,
    with_factor,
    with_warmup,
)
from utils.calendar import Calendar
from utils.errors import UserError


def build_scheduler(config, calendar: Calendar) -> Schedule:
    """The learning rate of each step.

    The configured rates are multiplied by :func:`rate_scale`, which follows the batch of the step.
    """
    schedule = _curve(config, calendar)
    if calendar.is_even or not config.TRAIN.LR_REFERENCE_BATCH:
        return schedule
    return lambda step: schedule(step) * calendar.global_batch_at(step) / calendar.global_batch


def _curve(config, calendar: Calendar) -> Schedule:
    train, scale = config.TRAIN, rate_scale(config, calendar.global_batch)
    base_lr, min_lr, warmup_lr = (lr * scale for lr in (train.BASE_LR, train.MIN_LR, train.WARMUP_LR))
    steps, wanted = total_steps(config, calendar), train.LR_SCHEDULER
    warmup_steps = train.WARMUP_STEPS or calendar.first_step(train.WARMUP_EPOCHS)
    if warmup_steps >= steps:
        raise UserError(
            f"the warm-up takes {warmup_steps:,} steps (TRAIN.WARMUP_STEPS, or WARMUP_EPOCHS of "
            f"{calendar.first_step(1):,}), the run {steps:,}; make it shorter"
        )
    match wanted.NAME:
        case "cosine":
            schedule = cosine(base_lr, min_lr, steps)
        case "linear":
            schedule = linear(base_lr, min_lr, steps, warmup_steps)
        case "constant":
            before = calendar.first_step(max(train.EPOCHS - wanted.COOLDOWN_EPOCHS, 0))
            cooldown_steps = wanted.COOLDOWN_STEPS or calendar.first_step(train.EPOCHS) - before
            if warmup_steps + cooldown_steps > steps:
                raise UserError(
                    f"warm-up and cool-down take {warmup_steps:,} and {cooldown_steps:,} steps "
                    f"(TRAIN.LR_SCHEDULER.COOLDOWN_STEPS, or COOLDOWN_EPOCHS), the run {steps:,}; make them shorter"
                )
            schedule = constant(base_lr, min_lr, steps, cooldown_steps)
        case "one_cycle":
            return one_cycle(warmup_lr, base_lr, min_lr, steps, warmup_steps)
        case "restarts":
            first = calendar.first_step(wanted.CYCLE_EPOCHS)
            schedule = restarts(base_lr, min_lr, first, wanted.CYCLE_GROWTH, wanted.CYCLE_DECAY)
        case "step":
            decay_steps = calendar.first_step(wanted.DECAY_EPOCHS)
            schedule = step_decay(base_lr, wanted.DECAY_RATE, decay_steps, warmup_steps)
        case "poly":
            curve = poly(base_lr, min_lr, steps, wanted.POWER)
            return with_factor(curve, warmup_lr / base_lr if base_lr else 1.0, warmup_steps)
        case "multistep":
            decay_at = [calendar.first_step(epoch) for epoch in wanted.DECAY_AT]
            steps_down = multistep(base_lr, wanted.DECAY_RATE, decay_at)
            return with_factor(steps_down, warmup_lr / base_lr if base_lr else 1.0, warmup_steps)
        case unknown:
            raise UserError(f"TRAIN.LR_SCHEDULER.NAME {unknown} is not known")
    return with_warmup(schedule, warmup_lr, base_lr, warmup_steps)


def rate_scale(config, global_batch: int) -> float:
    """Compute the factor from the configured rates, for ``TRAIN.LR_REFERENCE_BATCH`` images a step, to those used."""
    return global_batch / config.TRAIN.LR_REFERENCE_BATCH if config.TRAIN.LR_REFERENCE_BATCH else 1.0


def total_steps(config, calendar: Calendar) -> int:
    """The length of a run in steps."""
    return config.TRAIN.STEPS or calendar.first_step(config.TRAIN.EPOCHS)
