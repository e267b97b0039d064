"""Images with label maps in uncompressed tar files: ``KEY.jpg`` and ``KEY.seg.png``, as WebDataset has samples."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.decoding import BadImage
from data.files import is_image, type_of
from data.index import Layout, Scan
from data.pairs import CLASS_FILES, VALUES, LabelMaps, decode_labels, read_classes, values_in
from data.tar import TarIndex, members_once, open_tar
from utils.errors import UserError

LABELS = ".seg.png"


class TarPairIndex(LabelMaps, TarIndex):
    """``offset`` and ``length`` are of the images, ``labels_offset`` and ``labels_length`` of their label maps."""

    def __getitem__(self, i: int) -> tuple[bytes, bytes]:
        offset, length = (int(self.arrays[f"labels_{which}"][i]) for which in ("offset", "length"))
        return self.read(i), self.read_member(i, offset, length)

    def name_of_labels(self, i: int) -> str:
        return f"{self.name(i)} (its label map)"


class TarPairLayout(Layout):
    """The tar files ``archives`` in a folder below ``root``, where ``classes.txt`` is too."""

    index_class = TarPairIndex

    def __init__(self, root: Path, split: str, archives: list[Path]):
        self.root, self.name, self.archives = root, f"{split}-pair-tar", archives

    def classes(self, cache_dir: str) -> list[str]:
        return read_classes(self.root)

    def scan(self) -> Scan:
        left_out: Counter[str] = Counter()
        classes, rows, values = self.classes(""), [], []
        for number, path in enumerate(self.archives):
            for image, labels, found in read_pairs(path, left_out):
                rows.append((number, *image, *labels))
                values.append(found)
        if not rows:
            raise UserError(f"{self.archives[0]} holds no pair; expected KEY.jpg and KEY{LABELS} inside")
        columns = np.array(rows, dtype=np.int64).T
        names = ("archive", "offset", "length", "labels_offset", "labels_length")
        kinds = dict.fromkeys(names, np.int64) | {"archive": np.int32, "length": np.int32}
        arrays = {name: column.astype(kinds[name]) for name, column in zip(names, columns, strict=True)}
        arrays["labels"] = np.zeros(len(rows), dtype=np.int32)
        arrays["values"] = np.packbits(np.stack(values), axis=1)
        arrays["table"] = np.arange(VALUES, dtype=np.uint8)
        archives = [os.path.relpath(path, self.root) for path in self.archives]
        sources = [*self.archives, self.archives[0].parent, *(self.root / name for name in CLASS_FILES)]
        return Scan(classes, arrays, archives, sources, dict(left_out))


def read_pairs(path: Path, left_out: Counter[str]) -> Iterator[tuple[tuple[int, int], tuple[int, int], np.ndarray]]:
    """Yield where image and label map of each pair of a tar are (offset and length), and the numbers in the map.

    Raises:
        UserError: the tar is damaged, or a label map is none.
    """
    images: dict[str, tuple[int, int]] = {}
    maps: dict[str, tuple[int, int]] = {}
    with open_tar(path) as file:
        for name, member in members_once(file, path, is_image, left_out):
            is_map = name.endswith(LABELS)
            key = name.removesuffix(LABELS) if is_map else os.path.splitext(name)[0]
            (maps if is_map else images)[key] = member.offset_data, member.size
        for key, (offset, length) in images.items():
            if key not in maps:
                left_out[f"{type_of(key)} without a label map"] += 1
                continue
            file.seek(maps[key][0])
            try:
                found = values_in(decode_labels(file.read(maps[key][1])))
            except BadImage as error:
                raise UserError(f"label map {path}:{key}{LABELS}: {error}") from error
            yield (offset, length), maps[key], found
    if alone := len(maps.keys() - images.keys()):
        left_out[f"{LABELS} without an image"] += alone
