"""Which of the known layouts a data set has."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data import imagenet
from data.files import folders_above, is_companion, list_folder
from data.folder import FolderLayout
from data.index import Layout
from data.tar import TarLayout
from data.zip import ZipLayout
from utils.errors import UserError

SPLITS = {"train": ("train",), "val": ("val", "validation")}
"""What the two parts of a data set may be called on disk."""


def find_layout(root: Path, split: str, layout: str) -> Layout | None:
    """Find out how ``split`` (train or val) of the data in ``root`` is kept; None where nothing of it is there.

    Args:
        layout: ``auto`` takes the first of ``folder``, ``zip``, ``imagenet`` and ``tar`` that is there.

    Raises:
        UserError: it is there, but not whole.
    """
    for name in LAYOUTS if layout == "auto" else [layout]:
        for folder in SPLITS[split]:
            found = LAYOUTS[name](root, folder)
            if found:
                return found
    return None


def missing(root: Path | str, split: str, layout: str, key: str = "DATA.DATA_PATH") -> UserError:
    """Say that there is no such split."""
    names = LAYOUTS if layout == "auto" else [layout]
    expected = ", ".join(EXPECTED[name].format(split=split) for name in names)
    return UserError(f"{key} {root} has no folder '{split}'; expected {expected} in it (see docs/data.md)")


def _folder(root: Path, split: str) -> Layout | None:
    folder = root / split
    if os.path.islink(folder) and not os.path.exists(folder):
        raise UserError(f"{folder} is a link that leads nowhere; mend or remove it")
    if not os.path.isdir(folder) or (tars_in(folder) and not list_folder(folder, folders_above(folder)).folders):
        return None
    return FolderLayout(root, split)


def _zip(root: Path, split: str) -> Layout | None:
    archive, map_file = root / f"{split}.zip", root / f"{split}_map.txt"
    if not os.path.lexists(archive) and not os.path.lexists(map_file):
        return None
    for path, other in ((archive, map_file), (map_file, archive)):
        if not os.path.lexists(path):
            raise UserError(f"{other} is there, but not {path}; the zip layout needs both (see docs/data.md)")
    return ZipLayout(root, split)


def _official(root: Path, split: str) -> Layout | None:
    if split == "train" and os.path.lexists(root / imagenet.TRAIN):
        return imagenet.OfficialTrainLayout(root)
    if split == "val" and os.path.lexists(root / imagenet.VAL):
        return imagenet.OfficialValLayout(root)
    return None


def _tar(root: Path, split: str) -> Layout | None:
    official = (imagenet.TRAIN, imagenet.VAL)
    archives = tars_in(root / split) or tars_in(root, lambda name: name not in official and split in words_of(name))
    return TarLayout(root, split, archives) if archives else None


def tars_in(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """List the tar files in a folder whose names are ``wanted``, sorted; none where it is not there."""

    def names() -> Iterator[str]:
        if not os.path.isdir(folder):
            return
        try:
            yield from (name for name in os.listdir(folder) if name.endswith(".tar") and not is_companion(name))
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}") from error

    return [folder / name for name in sorted(names()) if wanted(name)]


def words_of(name: str) -> list[str]:
    """Split ``imagenet1k-train-0001.tar`` into imagenet1k, train, tar."""
    return re.split(r"[-_.{}0-9]+", name)


LAYOUTS: dict[str, Callable[[Path, str], Layout | None]] = {
    "folder": _folder,
    "zip": _zip,
    "imagenet": _official,
    "tar": _tar,
}
EXPECTED = {
    "folder": "{split}/CLASS/*.jpg",
    "zip": "{split}.zip with {split}_map.txt",
    "imagenet": "ILSVRC2012_img_{split}.tar",
    "tar": "{split}/*.tar",
}
