"""The mean intersection over union, exact on any number of processes: one integer confusion matrix, summed up."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.augmentation.pairs import VOID


class Scores(NamedTuple):
    """What a confusion matrix says. A class that never occurs has no accuracy; one that is not answered either, no IoU.

    Attributes:
        iou: of each class, ``(classes,)``, NaN where there is none.
        accuracy: the share of each class's pixels that is found, likewise.
        miou, mean_accuracy: the means of those.
        pixel_accuracy: the share of all pixels that is right.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    miou: float
    mean_accuracy: float
    pixel_accuracy: float


def confusion_matrix(answers: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each true and answered class, ``(classes, classes)`` int64; void labels do not count.

    Args:
        answers: classes, of any shape.
        labels: true classes of the same shape, or VOID.
    """
    counts = labels != VOID
    pairs = labels[counts].long() * num_classes + answers[counts]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion: np.ndarray) -> Scores:
    """Sum up a confusion matrix, rows true classes."""
    hits, labelled, answered = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):
        iou, accuracy = hits / (labelled + answered - hits), hits / labelled
    pixels = labelled.sum()
    return Scores(
        iou,
        accuracy,
        mean_of_numbers(iou),
        mean_of_numbers(accuracy),
        float(hits.sum() / pixels) if pixels else float("nan"),
    )


def mean_of_numbers(values: np.ndarray) -> float:
    """Average those that are numbers; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def zeros(num_classes: int, device: torch.device) -> Tensor:
    """Begin a confusion matrix."""
    return torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
