"""The report on a segmenter: each class, what is confused with what, and the images that it knows least."""

import heapq
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decoding import tensor_to_pil
from tasks.miou import Scores, scores
from tasks.overlay import painted
from tasks.report import LOWEST_NAMED, shortened
from utils.contact_sheet import draw_rows
from utils.distributed import gathered, is_main
from utils.drawing import pyplot
from utils.errors import UserError
from utils.files import reason_of
from utils.tables import write_csv

SHOWN, CELL = 8, 256
"""Images in a sheet, and the pixels of the longest side of each."""
COLUMNS = ["image", "truth", "answer"]


class Seen(NamedTuple):
    """An image that was evaluated.

    Attributes:
        iou: the mean IoU of its classes.
        number: its place in the index.
        pictures: itself, and painted with the truth and with the answer.
    """

    iou: float
    number: int
    pictures: list[Image.Image]


class Album:
    """Keeps pictures of the first images of this rank, and of those with the lowest IoU.

    Args:
        mean, std: with which images were normalised.
        classes: their names.
        lowest: whether those with the lowest IoU are wanted.
    """

    def __init__(self, mean: list[float], std: list[float], classes: list[str], lowest: bool):
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        self.classes, self.keep_lowest = classes, lowest
        self.first: list[Seen] = []
        self.lowest: list[tuple[float, int, Seen]] = []

    def add(self, number: int, image: Tensor, labels: Tensor, answers: Tensor, confusion: Tensor) -> None:
        """Take an image ``(3, H, W)``, its label map and the answer, ``(H, W)`` each, and its confusion matrix."""
        is_first = len(self.first) < SHOWN // 2
        iou = scores(confusion.cpu().numpy()).miou if self.keep_lowest else float("nan")
        is_low = self.keep_lowest and (len(self.lowest) < SHOWN or iou < -self.lowest[0][0])
        if not (is_first or is_low):
            return
        pixels = ((image.cpu() * self.std + self.mean) * 255).round().clamp(0, 255).byte()
        photograph = tensor_to_pil(pixels)
        shown = Seen(iou, number, [photograph, *(self._painted(photograph, x) for x in (labels, answers))])
        for picture in shown.pictures:
            picture.thumbnail((CELL, CELL))
        if is_first:
            self.first.append(shown)
        if is_low:
            heapq.heappush(self.lowest, (-iou, -number, shown))
            if len(self.lowest) > SHOWN:
                heapq.heappop(self.lowest)  # the highest of them

    def _painted(self, photograph: Image.Image, labels: Tensor) -> Image.Image:
        return painted(photograph, labels.byte().cpu().numpy(), self.classes)

    def sheet(self) -> bytes:
        """Draw the first images."""
        rows = {str(seen.number): seen.pictures for seen in self.first}
        return draw_rows(rows, COLUMNS, "validation images, by their numbers", len(COLUMNS), CELL)

    def lowest_of_all(self) -> list[Seen]:
        """The images with the lowest IoU of all ranks. A collective."""
        mine = [seen for _, _, seen in self.lowest]
        return heapq.nsmallest(
            SHOWN, (seen for of_rank in gathered(mine) for seen in of_rank), key=lambda seen: seen[:2]
        )


def write_report(
    folder: Path, confusion: np.ndarray, classes: list[str], names: dict[int, str], low: list[Seen]
) -> str:
    """Write ``per_class.csv``, ``confusion_matrix.csv``, ``report.png`` and ``lowest.png``; returns a line about it.

    Args:
        folder: it is made.
        confusion: of the pixels, rows true classes.
        classes: their names.
        names: of the images in ``low``, by their numbers.
        low: the images with the lowest IoU.

    Raises:
        UserError: the folder cannot be written.
    """
    found = scores(confusion)
    known = np.flatnonzero(~np.isnan(found.iou))
    worst = known[np.argsort(found.iou[known], kind="stable")]
    line = "lowest IoU: " + ", ".join(f"{classes[i]} {100 * found.iou[i]:.1f} %" for i in worst[:3])
    if not is_main():
        return line
    try:
        folder.mkdir(parents=True, exist_ok=True)
        columns = zip(classes, confusion.sum(axis=1).tolist(), found.iou.tolist(), found.accuracy.tolist(), strict=True)
        rows = ([name, pixels, *("" if np.isnan(x) else x for x in shares)] for name, pixels, *shares in columns)
        write_csv(folder / "per_class.csv", ["class", "pixels", "iou", "accuracy"], rows)
        matrix = ([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
        write_csv(folder / "confusion_matrix.csv", ["true class", *classes], matrix)
        draw(folder / "report.png", confusion, classes, worst, found)
        lowest = {f"{100 * seen.iou:.1f} %  {names[seen.number]}": seen.pictures for seen in low}
        title = "the images with the lowest mean IoU of their classes"
        (folder / "lowest.png").write_bytes(draw_rows(lowest, COLUMNS, title, len(COLUMNS), CELL))
    except OSError as problem:
        raise UserError(f"{folder} cannot be written: {reason_of(problem)}; choose another --output") from problem
    return f"{line}  -> {folder}"


def draw(path: Path, confusion: np.ndarray, classes: list[str], worst: np.ndarray, found: Scores) -> None:
    """Draw the confusion matrix of the classes that occur, and those with the lowest IoU."""
    there = np.flatnonzero(confusion.sum(axis=1))
    part = confusion[np.ix_(there, there)]
    with pyplot() as plt:
        figure, (matrix, lowest) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
        figure.suptitle(
            f"mIoU {100 * found.miou:.2f}  mean accuracy {100 * found.mean_accuracy:.2f}  "
            f"pixel accuracy {100 * found.pixel_accuracy:.2f}"
        )
        drawn = matrix.imshow(part / part.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(drawn, ax=matrix, label="share of the true class's pixels")
        matrix.set(title="confusion matrix", xlabel="answered class", ylabel="true class")
        if len(there) <= 25:
            names = [shortened(classes[i]) for i in there]
            matrix.set_xticks(range(len(names)), names, rotation=90)
            matrix.set_yticks(range(len(names)), names)
        shown = worst[:LOWEST_NAMED][::-1]
        lowest.barh(range(len(shown)), 100 * found.iou[shown], color="#8ec5f4")
        lowest.set_yticks(range(len(shown)), [shortened(classes[i]) for i in shown])
        lowest.set(title=f"the {len(shown)} classes with the lowest IoU", xlabel="IoU (%)", xlim=(0, 100))
        lowest.grid(alpha=0.3)
        figure.savefig(path, dpi=110)
        plt.close(figure)
