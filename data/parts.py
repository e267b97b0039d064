"""Some of the images of an index, or those of several together, as an index of its own."""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import numpy as np

from data.index import ImageIndex
from utils.randomness import derive_seed


def falls_to_val(share: float, key: bytes) -> bool:
    """Tell whether what is called ``key`` belongs to the ``share`` that is set apart, whatever else there is."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") < share * 2**64


def divide(index: ImageIndex, share: float, seed: int) -> tuple["PartOfIndex", "PartOfIndex"]:
    """Divide images into those to train on and the ``share`` of each class to evaluate on.

    Where an image goes depends on the seed, its class and its name there, and on no other image; so the shares are
    exact on average only, as heads and tails are.
    """
    apart = np.array(
        [
            falls_to_val(share, repr((seed, index.classes[label], cast(Any, index).name_in_class(i))).encode())
            for i, label in enumerate(index.labels.tolist())
        ],
        dtype=bool,
    )
    return PartOfIndex(index, np.flatnonzero(~apart), counts=True), PartOfIndex(index, np.flatnonzero(apart))


def subset(index: ImageIndex, share: float, seed: int) -> "PartOfIndex":
    """Take the ``share`` of each class, one image at least; a larger share has all images of a smaller one."""
    by_class = np.argsort(index.labels, kind="stable")
    ends = np.searchsorted(index.labels[by_class], np.arange(len(index.classes) + 1))
    rows = []
    for name, start, end in zip(index.classes, ends, ends[1:], strict=False):
        generator = np.random.RandomState(derive_seed(seed, "subset", name) & 0xFFFFFFFF)
        rows.append(by_class[start:end][generator.permutation(end - start)][: max(round(share * (end - start)), 1)])
    return PartOfIndex(index, np.sort(np.concatenate(rows)), counts=True)


def only_classes(index: ImageIndex, classes: list[str]) -> ImageIndex:
    """Take the images of these classes, which are numbered in this order."""
    names = {*classes}
    wanted = np.isin(index.labels, [number for number, name in enumerate(index.classes) if name in names])
    return PartOfIndex(index, np.flatnonzero(wanted), counts=True).with_classes(classes)


class PartOfIndex(ImageIndex):
    """The images ``rows`` (their numbers) of another index, in this order.

    Args:
        whole: the other one.
        rows: ``(N,)``.
        counts: whether it is this part that tells of files that are left out.
    """

    def __init__(self, whole: ImageIndex, rows: np.ndarray, counts: bool = False):
        super().__init__(whole.root, whole.classes, {"labels": whole.labels[rows]}, whole.archives, whole.file)
        self.whole, self.rows = whole, rows.astype(np.int64)
        self.left_out, self.checksum = whole.left_out if counts else {}, whole.checksum

    def __reduce__(self):
        return _restore, (type(self), vars(self))

    def read(self, i: int) -> bytes:
        return self.whole.read(int(self.rows[i]))

    def read_ahead(self, part: int, parts: int) -> int:
        if type(self.whole).read_ahead is ImageIndex.read_ahead:
            return super().read_ahead(part, parts)  # image by image: its own alone
        return self.whole.read_ahead(part, parts)

    def expect(self, numbers: Sequence[int]) -> None:
        self.whole.expect([int(self.rows[i]) for i in numbers])

    def name(self, i: int) -> str:
        return self.whole.name(int(self.rows[i]))

    def name_in_class(self, i: int) -> str:
        """Name image ``i`` within its class's folder."""
        return cast(Any, self.whole).name_in_class(int(self.rows[i]))


class JoinedIndex(ImageIndex):
    """The images of several indexes, one after the other; their classes are numbered as in ``classes``."""

    def __init__(self, parts: Sequence[ImageIndex], classes: list[str]):
        parts = [part.with_classes(classes) for part in parts]
        labels = np.concatenate([part.labels for part in parts])
        archives = [archive for part in parts for archive in part.archives]
        super().__init__(parts[0].root, classes, {"labels": labels}, archives, parts[0].file)
        self.parts = parts
        self.ends = np.array(list(accumulate(map(len, parts))))
        self.checksum = "".join(part.checksum for part in parts)
        kinds = {kind for part in parts for kind in part.left_out}
        self.left_out = {kind: sum(part.left_out.get(kind, 0) for part in parts) for kind in kinds}

    def __reduce__(self):
        return _restore, (type(self), vars(self))

    def read(self, i: int) -> bytes:
        part, row = self._place(i)
        return part.read(row)

    def read_ahead(self, part: int, parts: int) -> int:
        return sum(index.read_ahead(part, parts) for index in self.parts)

    def expect(self, numbers: Sequence[int]) -> None:
        places = [self._place(i) for i in numbers]
        for index in self.parts:
            index.expect([row for part, row in places if part is index])

    def name(self, i: int) -> str:
        part, row = self._place(i)
        return part.name(row)

    def name_in_class(self, i: int) -> str:
        """Name image ``i`` within its class's folder."""
        part, row = self._place(i)
        return cast(Any, part).name_in_class(row)

    def _place(self, i: int) -> tuple[ImageIndex, int]:
        number = int(np.searchsorted(self.ends, i, side="right"))
        return self.parts[number], i - int(self.ends[number - 1] if number else 0)


def _restore(kind: type[ImageIndex], content: dict[str, Any]) -> ImageIndex:
    index = object.__new__(kind)
    vars(index).update(content)
    return index
