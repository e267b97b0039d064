"""Samples as a pure function of (seed, epoch, index), and batches of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.augmentation import Plan
from data.decoding import AS_PUBLISHED, BadImage, Decoding, decode_with_orientation
from data.index import ImageIndex, Index
from data.ring import Ring, Slot
from utils.errors import UserError
from utils.files import reason_of
from utils.randomness import derive_seed, seed_cpu

MAX_REPLACEMENTS = 100
"""So many images in a row that cannot be decoded are no longer bad luck."""


class Sample(NamedTuple):
    """What a task makes of one item of an index.

    Attributes:
        image: ``(3, H, W)`` uint8.
        target: what is to be learned of it. Numbers become a batch ``(B,)`` int64; tensors must be of one shape, unless
            the images of a batch are of any size. Then it may also be a dict of numpy arrays.
        plan: what remains to be done to the image on the device.
        orientation: what EXIF says, 1 to 8 (1 is upright); 0 where nobody has looked.
    """

    image: Tensor
    target: int | Tensor | dict[str, np.ndarray]
    plan: Plan = Plan()
    orientation: int = 0


@dataclass
class DecodeAndTransform:
    """Makes samples of encoded images whose targets stay what the index says, as the numbers of classes do.

    Args:
        transform: decoded image to uint8 image and plan; it may draw from Python's, numpy's and torch's generators.
        decoding: how pixels are made of a file.
    """

    transform: Callable[[Tensor], tuple[Tensor, Plan]]
    decoding: Decoding = AS_PUBLISHED

    def __call__(self, raw: tuple[bytes | Image.Image, int], look: bool) -> Sample:
        """Make a sample of what an index has of an image; ``look`` at EXIF even where that changes no pixel.

        Raises:
            BadImage: the image cannot be decoded.
        """
        data, target = raw
        pixels, orientation = decode_with_orientation(data, self.decoding, look)
        image, plan = self.transform(pixels)
        return Sample(image, target, plan, orientation)


class Item(NamedTuple):
    """One place of a batch: a sample and its number in the index, or None where none could be made.

    ``bad`` has a line for each image that could not be decoded, ``failure`` one that says why there can be no sample at
    all (a file that cannot be opened, say). A worker hands both on instead of raising, which would lose the plain line.
    """

    sample: Sample | None
    number: int = -1
    bad: tuple[str, ...] = ()
    failure: str = ""


@dataclass
class HostBatch:
    """What the workers make of the samples of a batch; a batch on the device is a :class:`data.loading.Batch`.

    Attributes:
        images: ``(B, 3, H, W)`` uint8, channels last, or where they lie in a ring; or images of any sizes.
        targets: ``(B, ...)``, or targets of any sizes. Numpy arrays on the way from a worker.
        plans, numbers, orientations: of each image.
        bad, failure: as in an item, of the whole batch.
    """

    images: Any
    targets: Any
    plans: list[Plan]
    numbers: list[int]
    orientations: list[int]
    bad: list[str]
    failure: str

    def pin_memory(self) -> "HostBatch":
        """Copy images and targets into page-locked memory; torch's thread for that calls this."""
        if isinstance(self.images, list):
            images = [torch.as_tensor(x).pin_memory() for x in self.images]
            targets = [map_tensors(lambda x: torch.as_tensor(x).pin_memory(), target) for target in self.targets]
            return replace(self, images=images, targets=targets)
        return replace(self, images=self.images.pin_memory(), targets=torch.as_tensor(self.targets).pin_memory())


def map_tensors(function: Callable[[Any], Tensor], target: Any) -> Any:
    """Apply a function to a target, or to each value of one that is a dict."""
    return {name: function(x) for name, x in target.items()} if isinstance(target, dict) else function(target)


class ImageDataset(Dataset):
    """Reads the images of an index and makes samples of them.

    Args:
        index: which images there are; ``index[i]`` gives the bytes of image ``i`` (or a PIL image) and its label.
        sample: makes a sample of ``index[i]``; the second argument says whether to look at EXIF's orientation. It may
            draw from Python's, numpy's and torch's generators. Of a bad image it raises BadImage; other errors but
            UserError are taken for bugs, and end the run with a traceback.
        seed: of the run.
        replace_bad: take the next image of the index that can be decoded in place of one that cannot.
    """

    def __init__(self, index: Index, sample: Callable[[Any, bool], Sample], seed: int, replace_bad: bool):
        self.index = index
        self.sample = sample
        self.seed = seed
        self.replace_bad = replace_bad

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, ...]) -> Item:
        """Make the item at ``(epoch, i)`` or ``(epoch, i, repeat)``; the same key always gives the same sample."""
        epoch, i, *_ = key
        look = epoch == 0  # how many are turned is told of the first epoch, so nobody need look for it later
        bad: list[str] = []
        for candidate in range(i, i + MAX_REPLACEMENTS if self.replace_bad else i + 1):
            candidate %= len(self.index)
            try:
                raw = read_item(self.index, candidate)
                seed_cpu(derive_seed(self.seed, "sample", *key))  # only now: to read over a network may draw, too
                sample = self.sample(raw, look)
            except BadImage as error:
                bad.append(f"{self.index.name(candidate)}: {error}")
            except UserError as error:
                return Item(None, bad=tuple(bad), failure=str(error))
            except OSError as error:
                failure = f"image {self.index.name(candidate)}: {reason_of(error)}"
                return Item(None, bad=tuple(bad), failure=failure)
            else:
                orientation = sample.orientation if look else 0
                return Item(sample._replace(orientation=orientation), candidate, tuple(bad))
        failure = f"image {self.index.name(candidate)}: the {len(bad)}th in a row" if self.replace_bad else ""
        return Item(None, bad=tuple(bad), failure=failure)


def read_item(index: Index, i: int) -> Any:
    """Read ``index[i]``.

    Raises:
        BadImage: what the index has of the image is damaged.
        OSError: its file cannot be opened or read.
        UserError: from the index.
    """
    try:
        return index[i]
    except UserError:
        raise
    except Exception as error:  # decompression and data sets of others fail in arbitrary ways on arbitrary bytes
        if getattr(error, "errno", None):  # it is not the image that is bad
            raise
        raise BadImage(str(error) or type(error).__name__) from error


class BatchDataset(Dataset):
    """Makes batches: ``batches[number, keys]`` is batch ``number``, of the items of ``dataset`` at ``keys``.

    With a ``ring`` its images are written into the block whose turn it is, and only the block's place is sent.
    Images and targets of ``any_size`` stay apart.
    """

    def __init__(self, dataset: ImageDataset, ring: Ring | None = None, any_size: bool = False):
        self.dataset = dataset
        self.ring = ring
        self.any_size = any_size

    def __getitem__(self, key: tuple[int, list[tuple[int, ...]]]) -> HostBatch:
        number, keys = key
        if isinstance(self.dataset.index, ImageIndex):
            self.dataset.index.expect([i for _, i, *_ in keys])
        items = [self.dataset[image_key] for image_key in keys]
        if self.any_size:
            batch = collate_apart(items)
            targets = [target if isinstance(target, dict) else target.numpy() for target in batch.targets]
            return replace(batch, images=[image.numpy() for image in batch.images], targets=targets)
        if self.ring is None:
            return collate(items)
        slot = Slot(self.ring.number, number % len(self.ring), sum(item.sample is not None for item in items))
        batch = collate(items, slot.images())
        # No tensor goes through the queue: each would need shared memory and an open file of its own
        return replace(batch, images=slot, targets=batch.targets.numpy())


def collate(items: list[Item], out: Tensor | None = None) -> HostBatch:
    """Make a batch of items, its images in ``out`` when that is given; those without a sample are left out."""
    samples = [item.sample for item in items if item.sample is not None]
    if out is None:
        shape = samples[0].image.shape if samples else (3, 0, 0)
        out = torch.empty(len(samples), *shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for place, sample in zip(out, samples, strict=True):
        place.copy_(sample.image)
    targets: list[Any] = [sample.target for sample in samples]
    stacked = torch.stack(targets) if targets and isinstance(targets[0], Tensor) else torch.tensor(targets).long()
    return replace(collate_apart(items), images=out, targets=stacked)


def collate_apart(items: list[Item]) -> HostBatch:
    """Make a batch of items whose images and targets are of any sizes; those without a sample are left out."""
    samples = [item.sample for item in items if item.sample is not None]
    return HostBatch(
        images=[sample.image for sample in samples],
        targets=[sample.target for sample in samples],
        plans=[sample.plan for sample in samples],
        numbers=[item.number for item in items if item.sample is not None],
        orientations=[sample.orientation for sample in samples],
        bad=[line for item in items for line in item.bad],
        failure=next((item.failure for item in items if item.failure), ""),
    )
