"""Which images there are: a few flat arrays, however many images (no Python object for an image)."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError


def class_names(folder: Path) -> list[str]:
    """The class folders in ``folder``, sorted."""
    names = sorted(e.name for e in _entries(folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders; expected {folder}/CLASS/*.jpg")
    return names


class FolderIndex:
    """The images of a class-folder tree, in the order of their class and name.

    Attributes:
        classes: class names; an image's class is an index into them.
        labels: class of each image, ``(N,)`` int32.

    Raises:
        UserError: a class folder is empty, or is not one of ``classes``.
    """

    def __init__(self, folder: Path, classes: list[str]):
        self.folder = folder
        self.classes = classes
        number = {name: i for i, name in enumerate(classes)}
        names: list[bytes] = []  # one bytes object a class, not one an image
        ends: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        end = 0
        for name in class_names(folder):
            if name not in number:
                raise UserError(f"{folder / name} is not one of the {len(classes)} class folders of the training data")
            paths = [os.fsencode(f"{name}/{path}") for path in sorted(_images(folder / name))]
            if not paths:
                raise UserError(
                    f"class folder {folder / name} holds no image ({' '.join(IMG_EXTENSIONS)}); "
                    "put images there or remove the folder"
                )
            ends.append(end + np.cumsum([len(path) for path in paths], dtype=np.int64))
            end = int(ends[-1][-1])
            names.append(b"".join(paths))
            labels.append(np.full(len(paths), number[name], dtype=np.int32))
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.concatenate(ends)
        self.labels = np.concatenate(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> Path:
        """The file of image ``i``."""
        start = self._ends[i - 1] if i else 0
        return self.folder / os.fsdecode(self._names[start : self._ends[i]].tobytes())


def _images(folder: Path, prefix: str = "") -> Iterator[str]:
    """Paths of the images below ``folder``, relative to it."""
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield f"{prefix}{entry.name}"


def _entries(folder: Path) -> Iterable[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
