"""From a PIL image to a normalised tensor. Source: the published recipe."""

from collections.abc import Callable

from timm.data import create_transform
from torchvision import transforms

from utils.errors import UserError

CROP_RATIO = 224 / 256


def build_train_transform(config) -> Callable:
    """Random crop, flip, RandAugment (or colour jitter), normalising and random erasing."""
    aug = config.AUG
    try:
        return create_transform(
            config.DATA.IMG_SIZE,
            is_training=True,
            scale=tuple(aug.SCALE),
            ratio=tuple(aug.RATIO),
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=None if aug.AUTO_AUGMENT in ("", "none") else aug.AUTO_AUGMENT,
            interpolation=config.DATA.INTERPOLATION,
            mean=tuple(config.DATA.MEAN),
            std=tuple(config.DATA.STD),
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"AUG.AUTO_AUGMENT {aug.AUTO_AUGMENT} is not one that timm knows; use none or rand-m9-mstd0.5-inc1"
        ) from error


def build_eval_transform(config) -> Callable:
    """Resize to 256/224 of the image size and crop its centre (``TEST.CROP``), or resize to a square."""
    size = config.DATA.IMG_SIZE
    interpolation = transforms.InterpolationMode(config.DATA.INTERPOLATION)
    if config.TEST.CROP:
        geometry = [transforms.Resize(round(size / CROP_RATIO), interpolation), transforms.CenterCrop(size)]
    else:
        geometry = [transforms.Resize((size, size), interpolation)]
    return transforms.Compose(
        [*geometry, transforms.ToTensor(), transforms.Normalize(config.DATA.MEAN, config.DATA.STD)]
    )
