"""A class-folder tree: ``FOLDER/CLASS/**/*.jpg``."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.decoding import read_file
from data.files import Entries, describe_kinds, fewer_kinds, find_images, folders_above, is_image, list_folder, type_of
from data.index import ImageIndex, Layout, Scan
from utils.errors import UserError

SCAN_THREADS = 16
"""Listing folders of a network file system is waiting."""


class FileIndex(ImageIndex):
    """Each image is a file below its class's folder in ``archives[0]``.

    ``arrays`` holds their ``names`` in that folder, one after the other, and the ``ends`` of these.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._folders = self.classes  # whatever the classes are called later

    def name_in_class(self, i: int) -> str:
        """Give the path of image ``i`` from its class's folder."""
        names, ends = self.arrays["names"], self.arrays["ends"]
        return os.fsdecode(names[ends[i - 1] if i else 0 : ends[i]].tobytes())

    def path(self, i: int) -> Path:
        """Give the path of image ``i``."""
        return self.root / self.archives[0] / self._folders[self.arrays["labels"][i]] / self.name_in_class(i)

    def read(self, i: int) -> bytes:
        return read_file(self.path(i))

    def name(self, i: int) -> str:
        return str(self.path(i))


class FolderLayout(Layout):
    """The tree below ``root / folder``; ``.`` is the root itself."""

    index_class = FileIndex

    def __init__(self, root: Path, folder: str):
        self.root, self.folder, self.archives = root, root / folder, [root / folder]
        self.name = "flat-folder" if self.folder == root else f"{folder}-folder"

    def places(self, cache_dir: str) -> list[Path]:
        places = super().places(cache_dir)
        return places[1:] if self.folder == self.root else places  # the folder's date would change by it

    def classes(self, cache_dir: str) -> list[str]:
        return _class_names(self.folder, list_folder(self.folder, folders_above(self.folder)))

    def scan(self) -> Scan:
        inside = list_folder(self.folder, folders_above(self.folder))
        classes = _class_names(self.folder, inside)
        names: list[bytes] = []  # one bytes object a class, not one an image
        ends: list[np.ndarray] = []
        counts: list[int] = []
        sources = [self.folder]
        left_out = Counter(type_of(name) + " outside of the class folders" * is_image(name) for name in inside.files)
        end = 0
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            found_in = pool.map(lambda name: find_images(self.folder / name, inside.within), classes)
            for name, found in zip(classes, found_in, strict=True):
                if not found.images:
                    but = f" but {describe_kinds(found.left_out)}" if found.left_out else ""
                    raise UserError(
                        f"class folder {self.folder / name} holds no image{but} (.jpg, .png and others: see "
                        "docs/data.md); put images there or remove the folder"
                    )
                images = sorted(map(os.fsencode, found.images))
                ends.append(end + np.cumsum([len(image) for image in images], dtype=np.int64))
                end = int(ends[-1][-1])
                names.append(b"".join(images))
                counts.append(len(images))
                sources += found.folders
                left_out += found.left_out
        arrays: dict[str, np.ndarray] = {
            "labels": np.repeat(np.arange(len(classes), dtype=np.int32), counts),
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "ends": np.concatenate(ends),
        }
        return Scan(classes, arrays, [os.path.relpath(self.folder, self.root)], sources, fewer_kinds(left_out))


def _class_names(folder: Path, inside: Entries) -> list[str]:
    """Sort the class folders in ``folder``."""
    if not inside.folders:
        raise UserError(f"{folder} has no class folders; expected {folder}/CLASS/*.jpg (see docs/data.md)")
    return sorted(inside.folders)
