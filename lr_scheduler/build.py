"""From a config to a learning-rate schedule."""

from lr_scheduler.schedules import Schedule, cosine, linear, multistep, poly, step_decay, with_factor, with_warmup
from utils.errors import UserError


def build_scheduler(config, steps_per_epoch: int, global_batch: int) -> Schedule:
    """The learning rate of each step.

    The configured rates are multiplied by :func:`rate_scale`.
    """
    train, scale = config.TRAIN, rate_scale(config, global_batch)
    base_lr, min_lr, warmup_lr = (lr * scale for lr in (train.BASE_LR, train.MIN_LR, train.WARMUP_LR))
    steps = total_steps(config, steps_per_epoch)
    warmup_steps = train.WARMUP_STEPS or train.WARMUP_EPOCHS * steps_per_epoch
    if warmup_steps >= steps:
        raise UserError(
            f"the warm-up takes {warmup_steps:,} steps (TRAIN.WARMUP_STEPS, or WARMUP_EPOCHS of {steps_per_epoch:,}), "
            f"the run {steps:,}; make it shorter"
        )
    match train.LR_SCHEDULER.NAME:
        case "cosine":
            schedule = cosine(base_lr, min_lr, steps)
        case "linear":
            schedule = linear(base_lr, min_lr, steps, warmup_steps)
        case "step":
            decay_steps = train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch
            schedule = step_decay(base_lr, train.LR_SCHEDULER.DECAY_RATE, decay_steps, warmup_steps)
        case "poly":
            curve = poly(base_lr, min_lr, steps, train.LR_SCHEDULER.POWER)
            return with_factor(curve, warmup_lr / base_lr if base_lr else 1.0, warmup_steps)
        case "multistep":
            decay_at = [epoch * steps_per_epoch for epoch in train.LR_SCHEDULER.DECAY_AT]
            steps_down = multistep(base_lr, train.LR_SCHEDULER.DECAY_RATE, decay_at)
            return with_factor(steps_down, warmup_lr / base_lr if base_lr else 1.0, warmup_steps)
        case unknown:
            raise UserError(f"TRAIN.LR_SCHEDULER.NAME {unknown} is not one of cosine, linear, step, poly, multistep")
    return with_warmup(schedule, warmup_lr, base_lr, warmup_steps)


def rate_scale(config, global_batch: int) -> float:
    """Compute the factor from the configured rates, for ``TRAIN.LR_REFERENCE_BATCH`` images a step, to those used."""
    return global_batch / config.TRAIN.LR_REFERENCE_BATCH if config.TRAIN.LR_REFERENCE_BATCH else 1.0


def total_steps(config, steps_per_epoch: int) -> int:
    """The length of a run in steps."""
    return config.TRAIN.STEPS or config.TRAIN.EPOCHS * steps_per_epoch
