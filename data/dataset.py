"""Images as a pure function of (seed, epoch, index)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.decoding import AS_PUBLISHED, Decoding, decode_with_orientation
from data.index import ImageIndex
from data.policy import Plan
from data.ring import Ring, Slot
from data.timm_dataset import TimmImages
from utils.errors import UserError
from utils.randomness import derive_seed, seed_cpu

MAX_REPLACEMENTS = 100
"""So many images in a row that cannot be decoded are no longer bad luck."""


class Sample(NamedTuple):
    """One image ``(3, H, W)`` uint8 with its class and what remains to be done to it, or None instead of an image.

    ``number`` is its place in the index, ``orientation`` what EXIF says (1 is upright), 0 where nobody has looked.
    ``bad`` has a line for each file that could not be decoded, ``failure`` one that says why there can be no image at
    all (a file that cannot be opened, say). A worker hands both on instead of raising, which would lose the plain line.
    """

    image: Tensor | None
    target: int
    plan: Plan = Plan()
    number: int = -1
    orientation: int = 0
    bad: tuple[str, ...] = ()
    failure: str = ""


@dataclass
class Report:
    """What comes with a batch besides: each image's plan, number and orientation; the others as in a sample."""

    plans: list[Plan]
    numbers: list[int]
    orientations: list[int]
    bad: list[str]
    failure: str


class Batch(NamedTuple):
    """Images ``(B, 3, H, W)`` uint8, channels last (or where they lie), and their classes ``(B,)`` int64."""

    images: Tensor | Slot
    targets: Tensor | np.ndarray
    report: Report


class ImageDataset(Dataset):
    """Reads, decodes and transforms the images of an index.

    Args:
        index: which images there are; ``index[i]`` gives the bytes of image ``i`` and its class.
        transform: decoded image to uint8 image and plan; it may draw from Python's, numpy's and torch's generators.
        seed: of the run.
        replace_bad: take the next image of the index that can be decoded in place of one that cannot.
        decoding: how pixels are made of a file.
    """

    def __init__(
        self,
        index: ImageIndex | TimmImages,
        transform: Callable,
        seed: int,
        replace_bad: bool,
        decoding: Decoding = AS_PUBLISHED,
    ):
        self.index = index
        self.transform = transform
        self.seed = seed
        self.replace_bad = replace_bad
        self.decoding = decoding

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The image at ``(epoch, i)``; the same key gives the same pixels in whatever process and order."""
        epoch, i = key
        seed_cpu(derive_seed(self.seed, "sample", epoch, i))
        bad: list[str] = []
        for candidate in range(i, i + MAX_REPLACEMENTS if self.replace_bad else i + 1):
            candidate %= len(self.index)
            try:
                data, target = self.index[candidate]
                # How many are turned is told of the first epoch, so nobody need look for it later
                image, orientation = decode_with_orientation(data, self.decoding, look=epoch == 0)
            except UserError as error:
                return Sample(None, 0, bad=tuple(bad), failure=str(error))
            except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
                if getattr(error, "errno", None):  # it is not the image that is bad
                    failure = f"image {self.index.name(candidate)}: {error.strerror}"
                    return Sample(None, 0, bad=tuple(bad), failure=failure)
                bad.append(f"{self.index.name(candidate)}: {str(error) or type(error).__name__}")
            else:
                image, plan = self.transform(image)
                return Sample(image, target, plan, candidate, orientation if epoch == 0 else 0, tuple(bad))
        failure = f"image {self.index.name(candidate)}: the {len(bad)}th in a row" if self.replace_bad else ""
        return Sample(None, 0, bad=tuple(bad), failure=failure)


class BatchDataset(Dataset):
    """Whole batches of ``images``: ``batches[number, keys]``, in block ``number`` of ``ring`` where there is one."""

    def __init__(self, images: ImageDataset, ring: Ring | None = None):
        self.images = images
        self.ring = ring

    def __getitem__(self, key: tuple[int, list[tuple[int, int]]]) -> Batch:
        number, keys = key
        samples = [self.images[image_key] for image_key in keys]
        if self.ring is None:
            return collate(samples)
        slot = Slot(self.ring.number, number % len(self.ring), sum(sample.image is not None for sample in samples))
        batch = collate(samples, slot.images())
        # No tensor goes through the queue: each would need shared memory and an open file of its own
        return batch._replace(images=slot, targets=batch.targets.numpy())


def collate(samples: list[Sample], out: Tensor | None = None) -> Batch:
    """Samples as a batch, in ``out`` when that is given; those without an image are left out."""
    present = [sample for sample in samples if sample.image is not None]
    if out is None:
        shape = present[0].image.shape if present else (3, 0, 0)
        out = torch.empty(len(present), *shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for place, sample in zip(out, present, strict=True):
        place.copy_(sample.image)
    report = Report(
        [sample.plan for sample in present],
        [sample.number for sample in present],
        [sample.orientation for sample in present],
        [line for sample in samples for line in sample.bad],
        next((sample.failure for sample in samples if sample.failure), ""),
    )
    return Batch(out, torch.tensor([sample.target for sample in present], dtype=torch.int64), report)
