"""A class-folder tree: ``FOLDER/CLASS/**/*.jpg``."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.decoding import read_file
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
        """The path of image ``i`` from its class's folder."""
        names, ends = self.arrays["names"], self.arrays["ends"]
        return os.fsdecode(names[ends[i - 1] if i else 0 : ends[i]].tobytes())

    def path(self, i: int) -> Path:
        """The file of image ``i``."""
        return self.root / self.archives[0] / self._folders[self.arrays["labels"][i]] / self.name_in_class(i)

    def read(self, i: int) -> bytes:
        return read_file(self.path(i))

    def name(self, i: int) -> str:
        return str(self.path(i))


class FolderLayout(Layout):
    """The tree below ``root / folder``."""

    index_class = FileIndex

    def __init__(self, root: Path, folder: str):
        self.root, self.name, self.folder, self.archives = root, f"{folder}-folder", root / folder, [root / folder]

    def classes(self, cache_dir: str) -> list[str]:
        return class_names(self.folder)

    def scan(self) -> Scan:
        classes = class_names(self.folder)
        names: list[bytes] = []  # one bytes object a class, not one an image
        ends: list[np.ndarray] = []
        counts: list[int] = []
        sources = [self.folder]
        end = 0
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            listings = pool.map(lambda name: _list_class(self.folder / name), classes)
            for name, (images, folders) in zip(classes, listings, strict=True):
                if not images:
                    raise UserError(
                        f"class folder {self.folder / name} holds no image ({' '.join(IMG_EXTENSIONS)}); "
                        "put images there or remove the folder"
                    )
                ends.append(end + np.cumsum([len(image) for image in images], dtype=np.int64))
                end = int(ends[-1][-1])
                names.append(b"".join(images))
                counts.append(len(images))
                sources += folders
        arrays = {
            "labels": np.repeat(np.arange(len(classes), dtype=np.int32), counts),
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "ends": np.concatenate(ends),
        }
        return Scan(classes, arrays, [self.folder.name], sources)


def class_names(folder: Path) -> list[str]:
    """The class folders in ``folder``, sorted."""
    names = sorted(e.name for e in _entries(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders; expected {folder}/CLASS/*.jpg (see docs/data.md)")
    return names


def _list_class(folder: Path) -> tuple[list[bytes], list[Path]]:
    """The images below ``folder``, sorted, relative to it; and all folders that were looked into."""
    folders = [folder]
    images = sorted(os.fsencode(path) for path in _images(folder, "", folders))
    return images, folders


def _images(folder: Path, prefix: str, folders: list[Path]) -> Iterator[str]:
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(Path(entry.path))
            yield from _images(Path(entry.path), f"{prefix}{entry.name}/", folders)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield f"{prefix}{entry.name}"


def _entries(folder: Path) -> Iterable[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
