"""What is done to a batch on the training device: the rest of the augmentation, normalising, random erasing.

Each operation is that of Pillow (through timm), for many images at once and to the rounding of one grey level.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augmentation.policy import NOISE_OFFSETS, Operation, Patch, Plan, Recorder, build_policy, fill_colour
from utils.errors import UserError
from utils.image_size import height_and_width
from utils.randomness import derive_seed

ROUNDING = 1e-3


class DeviceStage:
    """Turns uint8 images ``(B, 3, H, W)`` and their plans into normalised float images, channels last.

    Nothing random is drawn here: the plans hold all draws, and the noise is read from a table that ``seed`` makes, so
    that an image does not depend on the batch, the rank or the device.

    Args:
        mean, std: of the channels, where white is 1.
        fill, interpolation: of warps: colour (0 to 255) from outside the image; nearest, bilinear or bicubic.
        erase: what patches are filled with: ``pixel`` noise, one ``rand`` colour, or the ``const`` mean.
    """

    def __init__(
        self,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
        fill: Sequence[int] = (0, 0, 0),
        interpolation: str = "bicubic",
        erase: str = "const",
        image_size: tuple[int, int] = (0, 0),
        seed: int = 0,
    ):
        self.device = device
        self.mean = 255 * torch.tensor(mean, device=device)
        self.inverse_std = 1 / (255 * torch.tensor(std, device=device))
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=device)[:, None, None]
        self.interpolation, self.erase = interpolation, erase
        if erase != "const":
            generator = torch.Generator().manual_seed(derive_seed(seed, "erasing"))
            self.noise = torch.randn(NOISE_OFFSETS + 3 * math.prod(image_size), generator=generator).to(device)

    def __call__(self, images: Tensor, plans: Sequence[Plan]) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if any(plan.operations for plan in plans):
            images = apply(images.clone(), [plan.operations for plan in plans], self.fill, self.interpolation)
        out = self.normalise(images)
        for image, plan in zip(out, plans, strict=True) if any(plan.patches for plan in plans) else ():
            for patch in plan.patches:
                image[:, patch.top : patch.top + patch.height, patch.left : patch.left + patch.width] = self._fill(
                    patch
                )
        return out

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 into float, each channel with mean 0 and deviation 1."""
        # By whole rows: on a CPU three times as fast as by the three values of a pixel
        rows = images.permute(0, 2, 3, 1).flatten(2).float()
        width = images.shape[-1]
        rows.sub_(self.mean.repeat(width)).mul_(self.inverse_std.repeat(width))
        return rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)

    def _fill(self, patch: Patch) -> Tensor | float:
        """Give the normalised values of a patch, ``(3, height, width)`` or what expands to it."""
        if self.erase == "const":
            return 0.0
        shape = (3, patch.height, patch.width) if self.erase == "pixel" else (3, 1, 1)
        return self.noise[patch.noise : patch.noise + math.prod(shape)].view(shape)


def augments_on_device(config, device: torch.device) -> bool:
    """Tell whether AUG.DEVICE leaves AUG.AUTO_AUGMENT or colour jitter to the GPU; else the workers do it with Pillow.

    Raises:
        UserError: AUG.DEVICE is ``cuda``, and there is no GPU or something that only runs on the CPU.
    """
    if config.AUG.DEVICE == "cpu" or (config.AUG.DEVICE == "auto" and device.type != "cuda"):
        return False
    if device.type != "cuda":
        raise UserError("AUG.DEVICE cuda: there is no GPU; use auto or cpu")
    try:
        unknown = Recorder(build_policy(config)).names - set(OPERATIONS)
    except TypeError:
        unknown = {config.AUG.AUTO_AUGMENT}
    if unknown and config.AUG.DEVICE == "cuda":
        raise UserError(f"AUG.DEVICE cuda: {', '.join(sorted(unknown))} only runs on the CPU; use auto or cpu")
    return not unknown


def build_train_stage(config, device: torch.device) -> DeviceStage:
    """Build what the device does to training images."""
    return DeviceStage(
        device,
        config.DATA.MEAN,
        config.DATA.STD,
        fill_colour(config.DATA.MEAN),
        config.DATA.INTERPOLATION,
        config.AUG.REMODE if config.AUG.REPROB else "const",
        height_and_width(config.DATA.IMG_SIZE),
        config.SEED,
    )


def apply(images: Tensor, operations: Sequence[Sequence[Operation]], fill: Tensor, interpolation: str) -> Tensor:
    """Carry out each image's operations, in place; images ``(B, 3, H, W)`` uint8.

    In every round the images that get the same kind of operation are taken together. The device is not waited for.
    """
    rounds: list[tuple[Callable, list[tuple[int, tuple[float, ...]]]]] = []
    for number in range(max(map(len, operations))):
        kinds: dict[Callable, list[tuple[int, tuple[float, ...]]]] = defaultdict(list)
        for i, of_image in enumerate(operations):
            if number < len(of_image):
                kind, of_size = OPERATIONS[of_image[number].name]
                kinds[kind].append((i, of_size(of_image[number].argument, *images.shape[-2:])))
        rounds += kinds.items()
    # One copy to the device for all of it, since each copy costs as much as a kernel
    flat = torch.tensor([(i, *arguments) for _, members in rounds for i, arguments in members], dtype=torch.float32)
    if images.device.type == "cuda":
        flat = flat.pin_memory().to(images.device, non_blocking=True)
    start = 0
    for kind, members in rounds:
        mine = flat[start : start + len(members)]
        start += len(members)
        rows, arguments = mine[:, 0].long(), mine[:, 1:, None, None, None]
        subset = images.index_select(0, rows)
        out = warp(subset, arguments, fill, interpolation) if kind is warp else kind(subset, arguments[:, 0])
        images.index_copy_(0, rows, out)
    return images


def autocontrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0 ... 255."""
    low, high = x.amin((2, 3)).double(), x.amax((2, 3)).double()
    scale = 255 / (high - low).clamp(min=1)
    table = torch.arange(256, device=x.device) * scale[..., None] - (low * scale)[..., None]
    return look_up(x, torch.where((high > low)[..., None], table, torch.arange(256.0, device=x.device).double()))


def equalize(x: Tensor, _: Tensor) -> Tensor:
    """Give each channel an even histogram."""
    values = x.flatten(2).long()
    counts = torch.zeros(*x.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, x.amax((2, 3)).long()[..., None])
    step = (counts.sum(2, keepdim=True) - last) // 255
    below = counts.cumsum(2) - counts
    table = (below + step // 2) // step.clamp(min=1)
    return look_up(x, torch.where(step > 0, table, torch.arange(256, device=x.device)))


def look_up(x: Tensor, table: Tensor) -> Tensor:
    """Take ``table[n, c, x]`` from tables ``(N, 3, 256)``."""
    return table.clamp(0, 255).to(torch.uint8).gather(2, x.flatten(2).long()).view(x.shape)


def invert(x: Tensor, _: Tensor) -> Tensor:
    return 255 - x


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits."""
    return x & (256 - 2 ** (8 - bits.clamp(max=8))).to(torch.uint8)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at or above the threshold."""
    return torch.where(x < threshold, x, 255 - x)


def solarize_add(x: Tensor, add: Tensor) -> Tensor:
    """Brighten what is below 128."""
    return torch.where(x < 128, (x + add).clamp(max=255).to(torch.uint8), x)


def blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Go from ``degenerate`` (factor 0) over ``x`` (1) and beyond; cut to whole levels as Pillow does."""
    degenerate = degenerate.float()
    return (degenerate + factor * (x - degenerate)).clamp(0, 255).to(torch.uint8)


def grey(x: Tensor) -> Tensor:
    """Compute the luma of ITU-R 601-2, ``(N, 1, H, W)``, in Pillow's fixed-point arithmetic."""
    red, green, blue = x.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def colour(x: Tensor, factor: Tensor) -> Tensor:
    return blend(grey(x), x, factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend((grey(x).double().mean((1, 2, 3), keepdim=True) + 0.5).floor(), x, factor)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return blend(torch.zeros_like(x), x, factor)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with a 3 x 3 smoothing whose centre weighs 5 of 13; the border is not smoothed."""
    smooth = x.float()
    if min(x.shape[-2:]) > 2:
        inner = smooth[..., 1:-1, 1:-1]
        smooth = smooth.clone()
        smooth[..., 1:-1, 1:-1] = ((F.avg_pool2d(x.float(), 3, 1) * 9 + 4 * inner) / 13 + 0.5).floor()
    return blend(smooth, x, factor)


def warp(x: Tensor, matrix: Tensor, fill: Tensor, interpolation: str) -> Tensor:
    """Map affinely: the pixel at (x, y) comes from (a x + b y + c, d x + e y + f), both measured at pixel centres.

    Args:
        matrix: (a, b, c, d, e, f) of each image, ``(N, 6, 1, 1, 1)``.
    """
    channels, height, width = x.shape[1:]
    a, b, c, d, e, f = (matrix[:, i, 0] for i in range(6))  # (N, 1, 1)
    row = torch.arange(height, device=x.device)[:, None] + 0.5
    column = torch.arange(width, device=x.device) + 0.5
    from_x, from_y = a * column + b * row + c, d * column + e * row + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    first_x, weights_x = taps(from_x, interpolation)
    first_y, weights_y = taps(from_y, interpolation)
    pixels = x.flatten(2)
    out = torch.zeros(x.shape, device=x.device)
    for j, weight_y in enumerate(weights_y):
        at_y = (first_y + j).clamp(0, height - 1) * width
        for i, weight_x in enumerate(weights_x):
            place = (at_y + (first_x + i).clamp(0, width - 1)).flatten(1)[:, None].expand(-1, channels, -1)
            out += (weight_y * weight_x)[:, None] * pixels.gather(2, place).view(x.shape)
    out += ROUNDING  # whole levels that came out a hair too low must not lose one
    return torch.where(inside[:, None], out.clamp(0, 255).to(torch.uint8), fill)


def taps(position: Tensor, interpolation: str) -> tuple[Tensor, list[Tensor]]:
    """Find the first pixel that one at ``position`` is made of, and the weights of that and the following ones."""
    if interpolation == "nearest":
        return position.floor().long(), [torch.ones_like(position)]
    first = (position - 0.5).floor()
    t = position - 0.5 - first
    if interpolation == "bilinear":
        return first.long(), [1 - t, t]
    # Pillow's cubic of warps (a = -1), which is not the one of its resizing
    weights = [-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, -(t**2) + t**3]
    return first.long() - 1, weights


def _plain(argument: float | None, height: int, width: int) -> tuple[float, ...]:
    return (argument or 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _desaturate(argument: float, height: int, width: int) -> tuple[float, ...]:
    return _plain(min(1.0, max(0.0, 1.0 - argument)), height, width)


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    cos, sin, x, y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


OPERATIONS: dict[str, tuple[Callable, Callable[[Any, int, int], tuple[float, ...]]]] = {
    "AutoContrast": (autocontrast, _plain),
    "Equalize": (equalize, _plain),
    "Invert": (invert, _plain),
    "Rotate": (warp, _rotation),
    "Posterize": (posterize, _plain),
    "PosterizeIncreasing": (posterize, _plain),
    "PosterizeOriginal": (posterize, _plain),
    "Solarize": (solarize, _plain),
    "SolarizeIncreasing": (solarize, _plain),
    "SolarizeAdd": (solarize_add, _plain),
    "Color": (colour, _plain),
    "ColorIncreasing": (colour, _plain),
    "Contrast": (contrast, _plain),
    "ContrastIncreasing": (contrast, _plain),
    "Brightness": (brightness, _plain),
    "BrightnessIncreasing": (brightness, _plain),
    "Sharpness": (sharpness, _plain),
    "SharpnessIncreasing": (sharpness, _plain),
    "Desaturate": (colour, _desaturate),
    "ShearX": (warp, lambda factor, height, width: (1, factor, 0, 0, 1, 0)),
    "ShearY": (warp, lambda factor, height, width: (1, 0, 0, factor, 1, 0)),
    "TranslateXRel": (warp, lambda share, height, width: (1, 0, share * width, 0, 1, 0)),
    "TranslateYRel": (warp, lambda share, height, width: (1, 0, 0, 0, 1, share * height)),
}
"""timm's operations: who carries each out, and with which (six) numbers for an argument and an image's size."""
