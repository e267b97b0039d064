"""From the bytes of an image and its objects to a sample."""

from dataclasses import dataclass

import numpy as np
import torch

from data.augmentation import Plan
from data.augmentation.objects import ObjectTransform, packed_masks
from data.coco import Objects
from data.dataset import Sample
from data.decoding import BadImage, Decoding, decode_with_orientation


@dataclass
class DecodeObjects:
    """Makes samples to train on of ``index[i]`` of a :class:`data.coco.ObjectIndex`.

    Args:
        decoding: how pixels are made of an image.
        transform: what is done to image and objects alike.
        masks: whether they are wanted; every object must have one then.
    """

    decoding: Decoding
    transform: ObjectTransform
    masks: bool

    def __call__(self, raw: tuple[bytes, Objects], look: bool) -> Sample:
        """Make a sample of an image ``(3, h, w)``; crowds are no targets.

        Its target has ``boxes`` ``(n, 4)`` float32, x1 y1 x2 y2; ``labels`` ``(n,)`` int64; ``size`` ``(2,)`` int64, h
        and w; and ``masks`` ``(n, h, ceil(w / 8))`` uint8, eight pixels in a byte, if they are wanted.

        Raises:
            BadImage: the image cannot be decoded, or is of another size than the annotations say.
        """
        pixels, orientation = decode_checked(raw, self.decoding, look)
        objects = raw[1]
        chosen = np.flatnonzero(~objects.crowd)
        there = self.transform(pixels, torch.from_numpy(objects.boxes[chosen]))
        chosen = chosen[there.stay.numpy()]
        target = {
            "boxes": there.boxes.numpy(),
            "labels": objects.labels[chosen].astype(np.int64),
            "size": np.array(there.image.shape[1:], dtype=np.int64),
        }
        if self.masks:
            target["masks"] = packed_masks(objects.masks(chosen.tolist()), there.rows, there.columns)
        return Sample(there.image, target, Plan(), orientation)


@dataclass
class DecodeWhole:
    """Makes samples to evaluate of ``index[i]`` of a :class:`data.coco.ObjectIndex`; arguments as DecodeObjects'."""

    decoding: Decoding
    transform: ObjectTransform

    def __call__(self, raw: tuple[bytes, Objects], look: bool) -> Sample:
        """Make a sample whose target has ``original_size`` ``(2,)``, height and width, and ``image_id`` ``()``, int64.

        Raises:
            BadImage: as of DecodeObjects.
        """
        pixels, orientation = decode_checked(raw, self.decoding, look)
        image = self.transform(pixels, torch.zeros(0, 4)).image
        target = {
            "original_size": np.array(raw[1].size, dtype=np.int64),
            "image_id": np.array(raw[1].image_id, dtype=np.int64),
        }
        return Sample(image, target, Plan(), orientation)


def decode_checked(raw: tuple[bytes, Objects], decoding: Decoding, look: bool) -> tuple[torch.Tensor, int]:
    """Decode an image whose size must be that of its annotations: ``(3, H, W)`` uint8, and EXIF's orientation."""
    pixels, orientation = decode_with_orientation(raw[0], decoding, look)
    if pixels.shape[1:] != raw[1].size:
        height, width = raw[1].size
        there = f"it is {pixels.shape[1]} x {pixels.shape[2]}, its annotations say {height} x {width}"
        raise BadImage(there + remedy_of_turning(raw, decoding, (pixels.shape[1], pixels.shape[2])))
    return pixels, orientation


def remedy_of_turning(raw: tuple[bytes, Objects], decoding: Decoding, size: tuple[int, int]) -> str:
    """Name the setting with which an image of another size fits its annotations; empty where none does."""
    other = decoding._replace(upright=not decoding.upright)
    if size[::-1] != raw[1].size or decode_with_orientation(raw[0], other, False)[0].shape[1:] != raw[1].size:
        return ""
    seen = "upright" if other.upright else "unturned"
    return f"; EXIF turns it, and they are of it {seen}: set DATA.UPRIGHT {other.upright}"
