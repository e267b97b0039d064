"""How a segmenter sees an image of any size: resized, in windows, at several scales, mirrored."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from config import Config
from data.augmentation.pairs import brought_within
from models.heads.layers import resize

CLASSES_AT_ONCE = 16

Ask = Callable[[Tensor], Tensor]
"""From images ``(B, 3, H, W)`` to logits ``(B, classes, h, w)``."""


class WholeImage:
    """Gives each pixel of an image its logits, or with several views those of the mean of their probabilities.

    One image is computed at a time and nothing is padded, so what it gets depends on no other image.

    Args:
        bounds: longest and shortest side that an image is brought within, its shape kept.
        multiple: each side is then resized up to a multiple of this.
        scales: of ``bounds``, one view for each.
        flip: as many mirrored views.
        window: height and width of squares that are computed one by one; 0 computes the whole at once.
        stride: from one window to the next.
    """

    def __init__(
        self,
        bounds: tuple[int, int],
        multiple: int = 32,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        window: int = 0,
        stride: int = 0,
    ):
        self.bounds, self.multiple, self.scales, self.flip = bounds, multiple, scales, flip
        self.window, self.stride = window, stride

    def __call__(self, ask: Ask, image: Tensor, size: tuple[int, ...]) -> Tensor:
        """Give the logits ``(classes, *size)`` of an image ``(3, H, W)``, float on the device."""
        views = list(self.views(image))
        if len(views) == 1:
            return resize(self._logits(ask, views[0][0]), size)[0]
        mean = torch.zeros(())
        for view, mirrored in views:
            probabilities = resize(self._logits(ask, view), size)[0].softmax(dim=0)
            mean = mean.to(probabilities) + (probabilities.flip(-1) if mirrored else probabilities) / len(views)
        return mean.log()

    def classes(self, ask: Ask, image: Tensor, size: tuple[int, ...]) -> Tensor:
        """Give each pixel's class, ``(*size)`` int64: the largest of the logits.

        Of a single view a few classes are resized at a time: those of all would take gigabytes of a large photograph.
        """
        views = list(self.views(image))
        if len(views) > 1:
            return self(ask, image, size).argmax(dim=0)
        logits = self._logits(ask, views[0][0])
        best, answers = resize(logits[:, :CLASSES_AT_ONCE], size)[0].max(dim=0)
        for first in range(CLASSES_AT_ONCE, logits.shape[1], CLASSES_AT_ONCE):
            value, answer = resize(logits[:, first : first + CLASSES_AT_ONCE], size)[0].max(dim=0)
            answers = torch.where(value > best, answer + first, answers)
            best = torch.maximum(best, value)
        return answers

    def views(self, image: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Yield what the model is to see, ``(1, 3, h, w)``, and whether it is mirrored."""
        for scale in self.scales:
            sides = brought_within(*image.shape[1:], *(scale * bound for bound in self.bounds))
            seen = resize(image[None], tuple(-(-side // self.multiple) * self.multiple for side in sides))
            yield seen, False
            if self.flip:
                yield seen.flip(-1), True

    def _logits(self, ask: Ask, view: Tensor) -> Tensor:
        """Logits ``(1, classes, h, w)`` at the size of the view, by way of which they are resized as published."""
        return self._in_windows(ask, view) if self.window else resize(ask(view).float(), tuple(view.shape[2:]))

    def _in_windows(self, ask: Ask, view: Tensor) -> Tensor:
        """Average the logits of windows that overlap, ``(1, classes, h, w)`` at the size of the view."""
        height, width = view.shape[2:]
        total, count = torch.zeros((), device=view.device), view.new_zeros(height, width)
        for top in starts(height, self.window, self.stride):
            for left in starts(width, self.window, self.stride):
                rows, columns = slice(top, top + self.window), slice(left, left + self.window)
                seen = view[:, :, rows, columns]
                logits = resize(ask(seen).float(), tuple(seen.shape[2:]))
                if not total.ndim:
                    total = logits.new_zeros(1, logits.shape[1], height, width)
                total[:, :, rows, columns] += logits
                count[rows, columns] += 1
        return total / count


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover a length; the last one ends where it does."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def build_whole_image(config: Config) -> WholeImage:
    """Build what TEST asks for."""
    test = config.TEST
    stride = test.STRIDE or max(1, round(2 * test.WINDOW / 3))
    bounds = test.RESIZE[0], test.RESIZE[1]
    return WholeImage(bounds, test.MULTIPLE, tuple(test.SCALES), test.VIEWS == "flip", test.WINDOW, stride)
