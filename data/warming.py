"""Reading a data set into the host's memory before a run (``--cache-mode``)."""

import os

from data.archive import ArchiveIndex
from data.index import ImageIndex

CHUNK = 2**24


def read_ahead(index: ImageIndex, part: int, parts: int) -> int:
    """Read the ``part``-th of ``parts`` shares of the data, so that the host keeps it in memory; returns bytes read.

    What is read stays in the page cache, which all processes of a host share, as long as there is memory for it.
    """
    if isinstance(index, ArchiveIndex):
        return sum(_read_share(index.root / archive, part, parts) for archive in index.archives)
    return sum(len(index.read(i)) for i in range(part, len(index), parts))


def _read_share(path, part: int, parts: int) -> int:
    total = 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = bytearray(CHUNK)
        for start in range(part * CHUNK, size, parts * CHUNK):
            file.seek(start)
            total += file.readinto(buffer)
    return total
