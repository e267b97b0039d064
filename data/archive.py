"""Images inside archives, read by offset; nothing is ever extracted."""

import os
from abc import abstractmethod
from array import array
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath

import numpy as np

from data.files import MAX_IMAGE_BYTES, fewer_kinds
from data.index import ImageIndex, Scan, order
from utils.errors import UserError
from utils.names import printable

MAX_OPEN_FILES = 128
"""Of one process; a limit of 1,024 is usual, and a data set may have more shards than that."""
MAX_CLASS_DIGITS = 6
MAX_NAME = 300
SPLIT_FOLDERS = ("train", "val", "validation")


class ArchiveIndex(ImageIndex):
    """``arrays``: ``archive`` (number), ``offset`` and ``length`` in bytes of each image."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._archive, self._offset, self._length = (self.arrays[key] for key in ("archive", "offset", "length"))
        self._files: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def __del__(self):
        if getattr(self, "_process", None) == os.getpid():
            for handle in self._files.values():
                os.close(handle)

    def archive(self, i: int) -> Path:
        """The archive that image ``i`` lies in."""
        return self.root / self.archives[self._archive[i]]

    @abstractmethod
    def member(self, i: int) -> str:
        """The name of image ``i`` in its archive, as far as the archive tells."""

    def name(self, i: int) -> str:
        try:
            member = self.member(i)
        except (OSError, UserError):
            member = f"byte {self._offset[i]:,}"
        return f"{self.archive(i)}:{printable(member[:MAX_NAME])}"

    def bytes_at(self, i: int, offset: int, length: int) -> bytes:
        """``length`` bytes of image ``i``'s archive, fewer at its end."""
        return os.pread(self._open(int(self._archive[i])), length, offset)

    def misfit(self, i: int) -> UserError:
        """The archive is not what was indexed."""
        return UserError(
            f"{self.archive(i)} does not fit its index {self.file} at byte {self._offset[i]:,}: it was changed or cut "
            "short; restore it, or remove the index so that it is made again"
        )

    def _open(self, number: int) -> int:
        if self._process != os.getpid():  # a forked worker has its own set
            self._process, self._files = os.getpid(), OrderedDict()
        if number in self._files:
            self._files.move_to_end(number)
        else:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[number] = os.open(self.root / self.archives[number], os.O_RDONLY)
        return self._files[number]


class Members:
    """Collects the images of ``archives``, all below ``root``, and brings them into the order of class and name.

    Attributes:
        left_out: kinds of files in them that are not used, counted by whoever looks into the archives.
    """

    def __init__(self, root: Path, archives: list[Path]):
        self.root, self.archives = root, archives
        self.names: list[bytes] = []
        self.labels, self.archive, self.length = array("i"), array("i"), array("i")
        self.offset = array("q")
        self.classes: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()

    def add(self, label: str, name: str, archive: int, offset: int, length: int) -> None:
        if length > MAX_IMAGE_BYTES:
            path = self.archives[archive]
            raise UserError(f"{path}:{name} has {length:,} bytes, too many for an image; remove it")
        self.names.append(name.encode("utf-8", "surrogateescape"))
        self.labels.append(self.classes.setdefault(label, len(self.classes)))
        self.archive.append(archive)
        self.offset.append(offset)
        self.length.append(length)

    def scan(self, classes: list[str], *more_sources: Path) -> Scan:
        """The result; ``classes`` in their order, ``more_sources`` what it depends on besides the archives."""
        number = {name: i for i, name in enumerate(classes)}
        renumbered = np.array([number[name] for name in self.classes], dtype=np.int32)
        labels = renumbered[np.frombuffer(self.labels, dtype=np.int32)]
        by_class = order(self.names, labels)
        arrays = {
            "labels": labels,
            "archive": np.frombuffer(self.archive, dtype=np.int32),
            "offset": np.frombuffer(self.offset, dtype=np.int64),
            "length": np.frombuffer(self.length, dtype=np.int32),
        }
        arrays = {key: value[by_class] for key, value in arrays.items()}
        archives = [os.path.relpath(path, self.root) for path in self.archives]
        return Scan(classes, arrays, archives, [*self.archives, *more_sources], fewer_kinds(self.left_out))


def class_and_name(member: str) -> tuple[str, str]:
    """``train/CLASS/NAME`` or ``CLASS/NAME`` as class (empty where there is no folder) and name."""
    parts = [part for part in PurePosixPath(member).parts if part not in (".", "/")]
    for place in (0, 1):  # as in train/CLASS/NAME and imagenet/train/CLASS/NAME; deeper it is no split's folder
        if parts[place : place + 1] and parts[place] in SPLIT_FOLDERS and len(parts) > place + 2:
            parts = parts[place + 1 :]
            break
    return (parts[0], "/".join(parts[1:])) if len(parts) > 1 else ("", parts[0])
