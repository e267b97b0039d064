"""What an evaluation can tell besides its accuracy: each class, the calibration, and what is taken for what."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.mistakes import Mistakes
from utils.distributed import is_main, sum_over_ranks
from utils.drawing import drawable, pyplot
from utils.errors import UserError
from utils.tables import write_csv

BINS = 15
LOWEST_NAMED = 15


class Report:
    """Collects the answers of an evaluation on all ranks, then writes tables and a picture of them.

    Args:
        classes: the names of the model's classes.
        device: where the answers are.
        mistakes: is told every answer.

    Raises:
        UserError: a package is missing.
    """

    def __init__(self, classes: list[str], device: torch.device, mistakes: Mistakes | None = None):
        try:
            import matplotlib  # noqa: F401  (before an hour of evaluation, not after)
            from torchmetrics.classification import MulticlassConfusionMatrix
        except ImportError as error:
            raise UserError(f"TEST.REPORT needs {error.name}: pip install {error.name}") from error
        self.classes, self.mistakes = classes, mistakes
        # Checking its arguments would wait for the device
        self.confusion = MulticlassConfusionMatrix(len(classes), validate_args=False).to(device)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor, numbers: Tensor) -> None:
        """Take the answers to a batch, ``(B, classes)``, its true classes and its places in the index, ``(B,)``."""
        self.confusion.update(logits, targets)
        confidence, answer = logits.softmax(dim=1).max(dim=1)
        which = (confidence * BINS).long().clamp(max=BINS - 1)
        counts = torch.stack([confidence, answer == targets, torch.ones_like(confidence)])
        self.bins.index_add_(1, which, counts.double())
        if self.mistakes:
            self.mistakes.add(numbers, targets, answer, confidence)

    def write(self, folder: Path) -> str:
        """Write ``per_class.csv``, ``confusion_matrix.csv``, ``calibration.csv``, ``report.png`` and the mistakes.

        It starts afresh. Returns a line that says so. A collective. Classes without an image are left out.

        Raises:
            UserError: the folder cannot be written.
        """
        confusion = self.confusion.compute().cpu().numpy()
        bins = calibration(sum_over_ranks(self.bins).cpu().numpy())
        self.confusion.reset()
        self.bins.zero_()
        images, correct = confusion.sum(axis=1), confusion.diagonal()
        present = np.flatnonzero(images)
        names = [self.classes[i] for i in present]
        accuracy = correct[present] / images[present]
        line = (
            f"mean accuracy of the classes {100 * accuracy.mean():.2f} %  "
            f"expected calibration error {100 * expected_calibration_error(bins):.2f} %"
        )
        mistakes = self.mistakes.collect() if self.mistakes else []
        if not is_main():
            return line
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.mistakes:
                self.mistakes.write(folder, mistakes)
            rows = zip(names, images[present].tolist(), correct[present].tolist(), accuracy.tolist(), strict=True)
            write_csv(folder / "per_class.csv", ["class", "images", "correct", "accuracy"], rows)
            matrix = ([name, *confusion[i].tolist()] for name, i in zip(names, present, strict=True))
            write_csv(folder / "confusion_matrix.csv", ["true class", *self.classes], matrix)
            write_csv(folder / "calibration.csv", ["confidence", "accuracy", "images"], bins)
            draw(folder / "report.png", names, confusion[np.ix_(present, present)], accuracy, bins, line)
        except OSError as problem:
            raise UserError(f"{folder} cannot be written: {problem.strerror}; choose another --output") from problem
        return f"{line}  -> {folder}"


def calibration(bins: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of images of each of BINS equal intervals of confidence; empty ones not.

    Args:
        bins: sums of the confidences, of the right answers and of the images of each interval, ``(3, BINS)``.
    """
    filled = bins[:, bins[2] > 0]
    confidence, accuracy = filled[:2] / filled[2]
    return list(zip(confidence.tolist(), accuracy.tolist(), filled[2].astype(int).tolist(), strict=True))


def expected_calibration_error(bins: list[tuple[float, float, int]]) -> float:
    """How far confidence and accuracy lie apart, on average over the images. Source: Guo et al., arXiv 1706.04599."""
    return sum(n * abs(accuracy - confidence) for confidence, accuracy, n in bins) / sum(n for _, _, n in bins)


def draw(path: Path, names: list[str], confusion: np.ndarray, accuracy: np.ndarray, bins: list, title: str) -> None:
    """Three panels: the confusion matrix, the classes with the lowest accuracy, confidence against accuracy."""
    with pyplot() as plt:
        draw_panels(plt, path, [shortened(name) for name in names], confusion, accuracy, bins, title)


def draw_panels(
    plt, path: Path, names: list[str], confusion: np.ndarray, accuracy: np.ndarray, bins: list, title: str
) -> None:
    figure, (matrix, lowest, reliability) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    figure.suptitle(title)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    drawn = matrix.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(drawn, ax=matrix, label="share of the true class")
    matrix.set(title="confusion matrix", xlabel="predicted class", ylabel="true class")
    if len(names) <= 20:
        matrix.set_xticks(range(len(names)), names, rotation=90)
        matrix.set_yticks(range(len(names)), names)
    order = np.argsort(accuracy, kind="stable")[:LOWEST_NAMED][::-1]
    lowest.barh(range(len(order)), 100 * accuracy[order], color="#8ec5f4")
    lowest.set_yticks(range(len(order)), [names[i] for i in order])
    lowest.set(title=f"the {len(order)} classes with the lowest accuracy", xlabel="accuracy (%)", xlim=(0, 100))
    confidence, hit, count = (np.array(column) for column in zip(*bins, strict=True))
    reliability.plot([0, 100], [0, 100], "--", color="grey", linewidth=1, label="perfectly calibrated")
    reliability.scatter(100 * confidence, 100 * hit, s=20 + 400 * count / count.sum(), alpha=0.7)
    reliability.set(title="calibration (size: number of images)", xlabel="confidence (%)", ylabel="accuracy (%)")
    reliability.legend(loc="lower right")
    for axis in (lowest, reliability):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shortened(name: str) -> str:
    """As a picture has room for."""
    name = drawable(name)
    return name if len(name) <= 24 else f"{name[:23]}…"
