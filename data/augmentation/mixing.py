"""Mixup and cutmix, on the training device."""

from collections.abc import Callable

from timm.data import Mixup

from utils.errors import UserError


def build_mixing(config, num_classes: int) -> Callable | None:
    """Build what turns ``(images, targets)`` into mixed images and soft targets ``(B, classes)``.

    It draws from numpy's global generator: seed that before each call. None where the settings have no mixing.

    Raises:
        UserError: mixing needs an even DATA.BATCH_SIZE.
    """
    aug = config.AUG
    if not (aug.MIXUP or aug.CUTMIX or aug.CUTMIX_MINMAX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise UserError(
            f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} is odd, and mixup and cutmix need an even one; "
            f"use {config.DATA.BATCH_SIZE + 1}, or turn them off with --opts AUG.MIXUP 0 AUG.CUTMIX 0"
        )
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX or None,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
    )
