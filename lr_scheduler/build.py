"""From a config to a learning-rate schedule."""

from lr_scheduler.schedules import Schedule, cosine, linear, step_decay, with_warmup


def build_scheduler(config, steps_per_epoch: int, global_batch: int) -> Schedule:
    """The learning rate of each step.

    The configured rates are for ``TRAIN.LR_REFERENCE_BATCH`` images a step and scale with ``global_batch``.
    """
    train = config.TRAIN
    scale = global_batch / train.LR_REFERENCE_BATCH if train.LR_REFERENCE_BATCH else 1.0
    base_lr, min_lr, warmup_lr = (lr * scale for lr in (train.BASE_LR, train.MIN_LR, train.WARMUP_LR))
    total_steps, warmup_steps = train.EPOCHS * steps_per_epoch, train.WARMUP_EPOCHS * steps_per_epoch
    match train.LR_SCHEDULER.NAME:
        case "cosine":
            schedule = cosine(base_lr, min_lr, total_steps)
        case "linear":
            schedule = linear(base_lr, min_lr, total_steps, warmup_steps)
        case "step":
            decay_steps = train.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch
            schedule = step_decay(base_lr, train.LR_SCHEDULER.DECAY_RATE, decay_steps, warmup_steps)
    return with_warmup(schedule, warmup_lr, base_lr, warmup_steps)
