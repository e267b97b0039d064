"""The images of an evaluation that are taken for another class: a table of all, and pictures of the surest ones."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.dataset import read_item
from data.decoding import BadImage, Decoding, decode, tensor_to_pil
from data.index import Index
from utils.distributed import gathered_on_main
from utils.errors import UserError
from utils.tables import write_csv

MOST_PICTURES = 60
LONGEST_SIDE = 320
READERS = 16


class Mistake(NamedTuple):
    """An image's place in the index, its class, and the class that it was taken for with this probability."""

    confidence: float
    number: int
    target: int
    answer: int


class Mistakes:
    """Collects the answers of an evaluation on all ranks.

    Args:
        classes: the names of the model's classes.
        index: the images.
        decoding: how they are decoded.
    """

    def __init__(self, classes: list[str], index: Index, decoding: Decoding):
        self.classes, self.index, self.decoding = classes, index, decoding
        self._given: list[tuple[Tensor, ...]] = []

    def add(self, numbers: Tensor, targets: Tensor, answers: Tensor, confidence: Tensor) -> None:
        """Take the images' places in the index, their classes, the answers and their probabilities, ``(B,)`` each."""
        self._given.append((numbers, targets, answers, confidence))  # which are wrong, the device need not tell yet

    def collect(self) -> list[Mistake]:
        """Give rank 0 the mistakes of all ranks, the surest first, and the others none; starts afresh. A collective."""
        columns = [torch.cat([column.cpu() for column in columns]) for columns in zip(*self._given, strict=True)]
        self._given.clear()
        mine: list[Mistake] = []
        if columns:
            numbers, targets, answers, confidence = columns
            wrong = (targets != answers).nonzero()[:, 0]
            mine = list(
                zip(*(column[wrong].tolist() for column in (confidence, numbers, targets, answers)), strict=True)
            )
        of_ranks = gathered_on_main(mine) or []
        return sorted(
            (Mistake(*each) for of_rank in of_ranks for each in of_rank), key=lambda m: (-m.confidence, m.number)
        )

    def write(self, folder: Path, mistakes: list[Mistake]) -> None:
        """Write ``mistakes.csv`` and pictures of the first, ``mistakes/0001.jpg`` …, into a folder that is there.

        Raises:
            OSError: they cannot be written.
        """
        rows = (
            (self.index.name(m.number), self.classes[m.target], self.classes[m.answer], m.confidence) for m in mistakes
        )
        write_csv(folder / "mistakes.csv", ["image", "class", "answer", "confidence"], rows)
        pictures = folder / "mistakes"
        pictures.mkdir(exist_ok=True)
        for old in pictures.glob("[0-9][0-9][0-9][0-9].jpg"):
            old.unlink()
        for place, mistake in enumerate(mistakes[:MOST_PICTURES], start=1):
            self._draw(mistake.number, pictures / f"{place:04d}.jpg")

    def _draw(self, i: int, path: Path) -> None:
        try:
            picture = tensor_to_pil(decode(read_item(self.index, i)[0], self.decoding))
        except (BadImage, OSError, UserError):
            return  # it could be read a moment ago; the table has its name
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        picture.save(path, "JPEG", quality=85, subsampling=0)
