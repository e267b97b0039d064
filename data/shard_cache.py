"""Images of shards in object storage, kept on the disk of a host, which all its processes share."""

import fcntl
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

PREFIX = "shards-"
MARKS = "marks"
KEPT = 1 << 32
"""A mark is this and a CRC-32 of the image; 0 is of one that is not kept."""
BYTES_BETWEEN_COUNTS = 2**26


class ShardCache:
    """Keeps images in sparse copies of their shards, until ``limit`` bytes are reached.

    What is kept stays: images come in a new order in each epoch, so to replace some by others would bring nothing. An
    image counts as kept when its mark is written, after its bytes, and it is verified whenever it is read: a process
    may be killed at any moment.

    Args:
        folder: for all data sets; those that no run uses any more make room for others, the oldest first.
        name: of this data set, another one when it has changed.
        archive, offset, length: of each image, as :class:`data.archive.ArchiveIndex` has them.
        limit: bytes of all data sets together.

    Raises:
        OSError: nothing can be kept there.
    """

    def __init__(
        self, folder: Path, name: str, archive: np.ndarray, offset: np.ndarray, length: np.ndarray, limit: int
    ):
        self.folder = folder / f"{PREFIX}{name}"
        self._archive, self._offset, self._length, self._limit = archive, offset, length, limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / MARKS, os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(OSError):  # a file system without locks: nothing in it is ever removed then
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        os.ftruncate(self._lock, 8 * len(length))
        os.posix_fallocate(self._lock, 0, 8 * len(length))  # to write into a hole of a full disk would be a SIGBUS
        os.utime(self.folder / MARKS)
        self._marks = np.memmap(self.folder / MARKS, np.uint64, "r+", shape=(len(length),))
        self._others = make_room(folder, self.folder, int(length.sum()), limit)
        self._files: dict[int, int] = {}
        self._count()

    def get(self, i: int) -> bytes | None:
        """Read image ``i``; None if it is not kept, or damaged."""
        mark = int(self._marks[i])
        if not mark & KEPT:
            return None
        with suppress(OSError):
            data = os.pread(self._file(i), int(self._length[i]), int(self._offset[i]))
            if zlib.crc32(data) == mark ^ KEPT:
                return data
        return None

    def put(self, i: int, data: bytes) -> None:
        """Keep image ``i``, if there is room; a disk that is full is no error."""
        if self._used + self._written > self._limit:
            return
        with suppress(OSError):
            if os.pwrite(self._file(i), data, int(self._offset[i])) == len(data):
                self._marks[i] = KEPT | zlib.crc32(data)
                self._written += len(data)
        if self._written > BYTES_BETWEEN_COUNTS:
            self._count()

    def _count(self) -> None:
        """Find out how much all processes have kept."""
        self._used, self._written = self._others + int(self._length[self._marks != 0].sum()), 0

    def _file(self, i: int) -> int:
        number = int(self._archive[i])
        if number not in self._files:
            self._files[number] = os.open(self.folder / f"{number}.part", os.O_RDWR | os.O_CREAT, 0o644)
        return self._files[number]


def make_room(folder: Path, mine: Path, wanted: int, limit: int) -> int:
    """Remove other data sets that no process uses, the oldest first, while there is not room; bytes that remain."""
    sizes = {}
    for other in folder.glob(f"{PREFIX}*"):
        if other != mine:
            with suppress(OSError):
                sizes[other] = sum(512 * path.stat().st_blocks for path in other.iterdir())
    ages = {other: (other / MARKS).stat().st_mtime if (other / MARKS).exists() else 0.0 for other in sizes}
    for other in sorted(sizes, key=lambda each: ages[each]):
        if sum(sizes.values()) + wanted <= limit:
            break
        if _is_unused(other / MARKS):
            shutil.rmtree(other, ignore_errors=True)
            del sizes[other]
    return sum(sizes.values())


def _is_unused(marks: Path) -> bool:
    try:
        handle = os.open(marks, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
