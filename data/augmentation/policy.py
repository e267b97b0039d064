"""What the published augmentation does to an image, drawn apart from doing it.

The draws are timm's own: its policies run on a record instead of an image. So a plan that is carried out on a GPU has
the operations, probabilities and magnitudes that timm would have used on the CPU, and the same ones for the same seed.
"""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms import ColorJitter

from utils.compat import replace_operations
from utils.errors import UserError
from utils.image_size import height_and_width

NOISE_OFFSETS = 2**22
"""From how many places a patch of noise may begin."""
MIN_AREA, MAX_AREA = 0.02, 1 / 3
ASPECT = 0.3, 1 / 0.3
ATTEMPTS = 10


class Operation(NamedTuple):
    """One step of a policy: timm's name for it, and its argument (None where it has none)."""

    name: str
    argument: float | None


class Patch(NamedTuple):
    """A rectangle to erase, in pixels, and the place in the noise that fills it."""

    top: int
    left: int
    height: int
    width: int
    noise: int


class Plan(NamedTuple):
    """All that remains to be done to one image after crop and flip."""

    operations: tuple[Operation, ...] = ()
    patches: tuple[Patch, ...] = ()


def fill_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
    """Give the colour (0 to 255) that a rotation brings in from outside the image: the mean of the data."""
    return tuple(min(255, round(255 * channel)) for channel in mean)


def build_policy(config) -> list[Callable]:
    """Build timm's policy and colour jitter as transforms of a PIL image; AUTO_AUGMENT takes the place of the jitter.

    Raises:
        UserError: timm does not know AUG.AUTO_AUGMENT.
    """
    aug, size = config.AUG, min(height_and_width(config.DATA.IMG_SIZE))
    name = "" if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT
    transforms: list[Callable] = []
    if name:
        kind = name.partition("-")[0]
        parameters = dict(
            translate_const=int(size * 0.45),
            img_mean=fill_colour(config.DATA.MEAN),
            interpolation=str_to_pil_interp(config.DATA.INTERPOLATION),
        )
        if kind == "augmix":
            parameters["translate_pct"] = 0.3
        make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(kind, auto_augment_transform)
        try:
            transforms.append(make(name, parameters))
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"AUG.AUTO_AUGMENT {name} is not one that timm knows; use none or rand-m9-mstd0.5-inc1"
            ) from error
    if aug.COLOR_JITTER and (not name or "3a" in name):
        transforms.append(ColorJitter(*(aug.COLOR_JITTER,) * 3))
    return transforms


class Recorder:
    """Draws what transforms of :func:`build_policy` would do. They can no longer be used on images.

    Attributes:
        names: of all operations that it may draw.

    Raises:
        TypeError: one of them does not consist of operations (AugMix).
    """

    def __init__(self, transforms: list[Callable]):
        self.transforms = transforms
        self.names: set[str] = set()
        for transform in transforms:
            if isinstance(transform, ColorJitter):
                self.names |= {"Brightness", "Contrast", "Color"}
                continue
            self.names |= replace_operations(transform, lambda name: partial(_record, name))

    def draw(self) -> tuple[Operation, ...]:
        """Draw the operations for one image, in their order."""
        plan: tuple[Operation, ...] = ()
        for transform in self.transforms:
            plan = _draw_jitter(plan, transform) if isinstance(transform, ColorJitter) else transform(plan)
        return plan


def _record(name: str, plan: tuple[Operation, ...], *arguments, **_) -> tuple[Operation, ...]:
    return (*plan, Operation(name, *(arguments or (None,))))


def _draw_jitter(plan: tuple[Operation, ...], jitter: ColorJitter) -> tuple[Operation, ...]:
    order, *factors = ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    names = "Brightness", "Contrast", "Color"
    return (*plan, *(Operation(names[i], factors[i]) for i in order.tolist() if i < len(names)))


def draw_patches(probability: float, count: int, height: int, width: int) -> tuple[Patch, ...]:
    """Draw the rectangles of random erasing (arXiv 1708.04896), with timm's ranges and in timm's order."""
    if random.random() > probability:
        return ()
    patches = []
    count = random.randint(1, count) if count > 1 else 1
    for _ in range(count):
        for _attempt in range(ATTEMPTS):
            area = random.uniform(MIN_AREA, MAX_AREA) * height * width / count
            aspect = math.exp(random.uniform(*map(math.log, ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                patches.append((top, left, h, w))
                break
    return tuple(Patch(*patch, random.randrange(NOISE_OFFSETS)) for patch in patches)
