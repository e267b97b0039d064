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

CHUNK = 2**24
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
        self._files = OpenFiles()

    def archive(self, i: int) -> Path:
        """Say which archive image ``i`` lies in."""
        return self.root / self.archives[self._archive[i]]

    @abstractmethod
    def member(self, i: int) -> str:
        """Read the name of image ``i`` in its archive.

        Raises:
            OSError: the archive cannot be opened or read.
            UserError: it does not fit the index.
        """

    def name_in_class(self, i: int) -> str:
        """Read the name of image ``i`` in its archive, without the folder of its class if it has one."""
        member = self.member(i)
        folder, name = class_and_name(member)
        return name if not folder or folder == self.classes[self.labels[i]] else member

    def name(self, i: int) -> str:
        try:
            member = self.member(i)
        except (OSError, UserError):
            member = f"byte {self._offset[i]:,}"
        return f"{self.archive(i)}:{printable(member[:MAX_NAME])}"

    def read_ahead(self, part: int, parts: int) -> int:
        total, buffer = 0, bytearray(CHUNK)
        for archive in self.archives:
            with open(self.root / archive, "rb", buffering=0) as file:
                for start in range(part * CHUNK, os.fstat(file.fileno()).st_size, parts * CHUNK):
                    file.seek(start)
                    total += file.readinto(buffer)
        return total

    def bytes_at(self, i: int, offset: int, length: int) -> bytes:
        """Read ``length`` bytes of image ``i``'s archive, fewer at its end."""
        return os.pread(self._files.open(self.archive(i)), length, offset)

    def misfit(self, i: int) -> UserError:
        """Say that the archive of image ``i`` is not what was indexed."""
        return UserError(
            f"{self.archive(i)} does not fit its index {self.file} at byte {self._offset[i]:,}: it was changed or cut "
            "short; restore it, or remove the index so that it is made again"
        )


class OpenFiles:
    """The files that a process has open for reading, MAX_OPEN_FILES at most: those that were used last."""

    def __init__(self):
        self._handles: OrderedDict[Path, int] = OrderedDict()
        self._process = os.getpid()

    def __del__(self):
        if self._process == os.getpid():
            for handle in self._handles.values():
                os.close(handle)

    def open(self, path: Path) -> int:
        """Give a handle of the file, opening it if need be."""
        if self._process != os.getpid():  # a forked worker has its own set
            self._process, self._handles = os.getpid(), OrderedDict()
        if path in self._handles:
            self._handles.move_to_end(path)
        else:
            if len(self._handles) >= MAX_OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[path] = os.open(path, os.O_RDONLY)
        return self._handles[path]


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
        """Add an image of class ``label``, ``length`` bytes from ``offset`` on in the archive of this number.

        Raises:
            UserError: it is too long.
        """
        if length > MAX_IMAGE_BYTES:
            path = self.archives[archive]
            raise UserError(f"{path}:{name} has {length:,} bytes, too many for an image; remove it")
        self.names.append(name.encode("utf-8", "surrogateescape"))
        self.labels.append(self.classes.setdefault(label, len(self.classes)))
        self.archive.append(archive)
        self.offset.append(offset)
        self.length.append(length)

    def scan(self, classes: list[str], *more_sources: Path) -> Scan:
        """Sum up; ``classes`` in their order, ``more_sources`` what the result depends on besides the archives."""
        number = {name: i for i, name in enumerate(classes)}
        renumbered = np.array([number[name] for name in self.classes], dtype=np.int32)
        labels = renumbered[np.frombuffer(self.labels, dtype=np.int32)]
        by_class = order(self.names, labels)
        arrays: dict[str, np.ndarray] = {
            "labels": labels,
            "archive": np.frombuffer(self.archive, dtype=np.int32),
            "offset": np.frombuffer(self.offset, dtype=np.int64),
            "length": np.frombuffer(self.length, dtype=np.int32),
        }
        arrays = {key: value[by_class] for key, value in arrays.items()}
        archives = [os.path.relpath(path, self.root) for path in self.archives]
        return Scan(classes, arrays, archives, [*self.archives, *more_sources], fewer_kinds(self.left_out))


def class_and_name(member: str) -> tuple[str, str]:
    """Split ``train/CLASS/NAME`` or ``CLASS/NAME`` into class (empty where there is no folder) and name."""
    parts = [part for part in PurePosixPath(member).parts if part not in (".", "/")]
    for place in (0, 1):  # as in train/CLASS/NAME and imagenet/train/CLASS/NAME; deeper it is no split's folder
        if parts[place : place + 1] and parts[place] in SPLIT_FOLDERS and len(parts) > place + 2:
            parts = parts[place + 1 :]
            break
    return (parts[0], "/".join(parts[1:])) if len(parts) > 1 else ("", parts[0])
