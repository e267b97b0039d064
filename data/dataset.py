"""Images as a pure function of (seed, epoch, index)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.index import FolderIndex
from utils.randomness import derive_seed, seed_cpu

MAX_REPLACEMENTS = 100
"""So many images in a row that cannot be decoded are no longer bad luck."""


class Sample(NamedTuple):
    """One image ``(3, H, W)`` with its class, or None instead of an image.

    ``bad`` has a line for each file that could not be decoded, ``failure`` one that says why there can be no image at
    all (a file that cannot be opened, say). A worker hands both on instead of raising, which would lose the plain line.
    """

    image: Tensor | None
    target: int
    bad: tuple[str, ...] = ()
    failure: str = ""


class Batch(NamedTuple):
    """Images ``(B, 3, H, W)`` and their classes ``(B,)``; ``bad`` and ``failure`` as in :class:`Sample`."""

    images: Tensor
    targets: Tensor
    bad: tuple[str, ...]
    failure: str


class ImageDataset(Dataset):
    """Reads, decodes and transforms the images of an index.

    Args:
        index: which images there are.
        transform: PIL image to tensor; it may draw from Python's, numpy's and torch's global generators.
        seed: of the run.
        replace_bad: take the next image of the index that can be decoded in place of one that cannot.
    """

    def __init__(self, index: FolderIndex, transform: Callable, seed: int, replace_bad: bool):
        self.index = index
        self.transform = transform
        self.seed = seed
        self.replace_bad = replace_bad

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The image at ``(epoch, i)``; the same key gives the same pixels in whatever process and order."""
        epoch, i = key
        seed_cpu(derive_seed(self.seed, "sample", epoch, i))
        bad: list[str] = []
        for candidate in range(i, i + MAX_REPLACEMENTS if self.replace_bad else i + 1):
            candidate %= len(self.index)
            path, target = self.index.path(candidate), int(self.index.labels[candidate])
            try:
                image = decode(path)
            except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
                if getattr(error, "errno", None):  # it is not the image that is bad
                    return Sample(None, target, tuple(bad), f"{path}: {error.strerror}")
                bad.append(f"{path}: {error or type(error).__name__}")
            else:
                return Sample(self.transform(image), target, tuple(bad))
        return Sample(None, target, tuple(bad), f"{path}: the {len(bad)}th in a row" if self.replace_bad else "")


def decode(path) -> Image.Image:
    """The image in a file as RGB. Reads what the name does not promise too (PNG in .JPEG, CMYK, grey, palettes)."""
    with Image.open(path) as image:
        return image.convert("RGB")


def collate(samples: list[Sample]) -> Batch:
    """Samples as a batch; those without an image are left out."""
    present = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in present]) if present else torch.empty(0)
    targets = torch.tensor([sample.target for sample in present], dtype=torch.int64)
    bad = tuple(line for sample in samples for line in sample.bad)
    return Batch(images, targets, bad, next((sample.failure for sample in samples if sample.failure), ""))
