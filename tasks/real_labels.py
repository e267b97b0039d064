"""ImageNet-ReaL: the validation images with every label that fits them. Source: Beyer et al., arXiv 2006.07159."""

import re

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from data.index import Index
from utils.distributed import sum_over_ranks
from utils.errors import UserError

IMAGES = 50_000
"""Validation images of ImageNet, numbered from 1 in their file names."""


class RealLabels:
    """Accuracy where any of an image's labels is right; an image without one does not count.

    Args:
        index: validation images of ImageNet under their own file names, in any layout.
        classes: of the model.
        device: where the answers are.

    Raises:
        UserError: the images or the classes are others.
    """

    def __init__(self, index: Index, classes: list[str], device: torch.device):
        labels = RealLabelsImagenet(range(IMAGES)).real_labels
        if len(classes) != ImageNetInfo("imagenet-1k").num_classes():
            raise UserError(f"TEST.REAL_LABELS is for the 1,000 classes of ImageNet; the model has {len(classes)}")
        fits = torch.zeros(len(index), len(classes), dtype=torch.bool)
        for i in range(len(index)):
            found = re.search(r"ILSVRC2012_val_\d{8}", index.name(i))
            if not found or (name := f"{found[0]}.JPEG") not in labels:
                raise UserError(
                    f"TEST.REAL_LABELS: {index.name(i)} is not a validation image of ImageNet, named "
                    "ILSVRC2012_val_00000001.JPEG to 00050000; leave it False for other data"
                )
            fits[i, labels[name]] = True
        self.fits = fits.to(device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # images, top-1, top-5

    def add(self, logits: Tensor, numbers: Tensor) -> None:
        """Take the answers to a batch, ``(B, 1000)``, whose images have these places in the index, ``(B,)``."""
        fits = self.fits[numbers.to(logits.device, non_blocking=True)]
        right = fits.gather(1, logits.topk(5, dim=1).indices)
        self.sums += torch.stack([fits.any(dim=1).sum(), right[:, 0].sum(), right.any(dim=1).sum()])

    def read(self) -> dict[str, float]:
        """``real_top1`` and ``real_top5`` in percent, and of how many images; starts afresh. A collective."""
        images, top1, top5 = sum_over_ranks(self.sums).tolist()
        self.sums.zero_()
        return {
            "real_top1": 100 * top1 / max(images, 1),
            "real_top5": 100 * top5 / max(images, 1),
            "real_images": int(images),
        }


def describe_real(values: dict[str, float]) -> str:
    """For a person."""
    return f"ReaL top-1 {values['real_top1']:.2f}  top-5 {values['real_top5']:.2f} of {values['real_images']:,} images"
