"""Which images there are and where their bytes lie: a few flat, memory-mapped arrays, however many images.

An index is built once from a data set's layout and kept in a file, which every process of a host maps into its memory:
the pages are shared, so that neither another rank nor a loader worker adds a copy. A checksum of all that is in the
file is kept with it, which each rank verifies when it opens the file: nobody would notice that a label was shifted.
"""

import fcntl
import hashlib
import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils.errors import UserError
from utils.files import reason_of, temporary_name

VERSION = "crossformer-trainer index 2"
SECONDS_WITHOUT_A_WORD = 2
RACY_SECONDS = 2
"""Within so short a time a file system may give two states of a folder the same date."""


class Index(Protocol):
    """Which images there are; ``index[i]`` is what a task makes a sample of, as the bytes of a file and a class.

    Attributes:
        root: the folder of the data.
        left_out: how many files of each kind lie in the data and are not used.
    """

    root: Path
    left_out: Mapping[str, int]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...

    def name(self, i: int) -> str:
        """Say where image ``i`` is, for people: a path, or the archive and the name in it."""


class Scan(NamedTuple):
    """What a layout has found out about its images.

    Attributes:
        classes: class names, in the order of the classes' numbers.
        arrays: what the layout's kind of index knows of the images, ``labels`` among them.
        archives: the files that hold the images (or the folder that does), relative to the layout's root.
        sources: the files and folders whose change makes all this stale.
        left_out: how many files of each kind are not used.
    """

    classes: list[str]
    arrays: dict[str, np.ndarray]
    archives: list[str]
    sources: list[Path]
    left_out: dict[str, int]


class ImageIndex(ABC):
    """Images in the order of their class and name: ``index[i]`` is the bytes of a file and the class.

    It never changes: what numbers or names the classes otherwise gives a copy, which shares the mapped arrays.

    Attributes:
        root: the folder that relative paths start from.
        classes: class names; an image's class is an index into them.
        labels: class of each image, ``(N,)`` int32.
        archives: the files that hold the images (or the folder that does), relative to ``root``.
        arrays: all that is known of the images, ``labels`` included.
        file: where it is kept.
        left_out: how many files of each kind lie in the data and are not used.
        checksum: of what the file holds.
    """

    left_out: Mapping[str, int]
    checksum: str

    def __init__(self, root: Path, classes: list[str], arrays: dict[str, np.ndarray], archives: list[str], file: Path):
        self.root, self.classes, self.arrays, self.archives, self.file = root, classes, arrays, archives, file
        self.labels = arrays["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[bytes, Any]:
        return self.read(i), int(self.labels[i])

    def __reduce__(self):  # a spawned worker maps the file itself instead of being sent the arrays
        labels = None if self.labels is self.arrays["labels"] else self.labels
        return _reopen, (type(self), self.root, self.file, self.checksum, self.classes, labels)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Read the bytes of image ``i``.

        Raises:
            OSError: its file cannot be opened or read.
            ValueError: they are too many for an image, or damaged.
            UserError: its archive does not fit the index.
        """

    @abstractmethod
    def name(self, i: int) -> str:
        """Say where image ``i`` is, for people: a path, or the archive and the name in it."""

    def read_ahead(self, part: int, parts: int) -> int:
        """Read share ``part`` of ``parts`` of the data, so that it is in memory later; returns how many bytes that are.

        They stay in the system's cache, which all processes of a host share, as long as there is memory for them.

        Raises:
            OSError: a file cannot be opened or read.
        """
        return sum(len(self.read(i)) for i in range(part, len(self), parts))

    def expect(self, numbers: Sequence[int]) -> None:
        """Get ready for images that are about to be read, in this process; nothing where they are at hand."""
        return

    def rename_classes(self, names: list[str]) -> Self:
        """Copy the index, its classes called ``names``."""
        return self._copy(names, self.labels)

    def with_classes(self, classes: list[str]) -> Self:
        """Copy the index, its classes numbered as in ``classes``.

        Raises:
            UserError: one of its classes is not among them.
        """
        if classes == self.classes:
            return self
        number = {name: i for i, name in enumerate(classes)}
        for label in np.unique(self.labels):
            if self.classes[label] not in number:
                raise UserError(
                    f"class {self.classes[label]!r} of {self.name(int((self.labels == label).argmax()))} is not one "
                    f"of the {len(classes)} classes of the training data; remove it or add it there"
                )
        renumbered = np.array([number.get(name, -1) for name in self.classes], dtype=np.int32)
        return self._copy(classes, renumbered[self.labels])

    def _copy(self, classes: list[str], labels: np.ndarray) -> Self:
        copy = object.__new__(type(self))
        copy.__dict__ |= self.__dict__ | {"classes": classes, "labels": labels}
        return copy


class Layout(ABC):
    """One way to have a split of a data set on disk.

    Attributes:
        root: the folder that relative paths start from, beside which the index is kept.
        name: tells this split and layout from others in the same folder.
        archives: the files that hold the images, or the folder.
        index_class: what reads the images.
    """

    root: Path
    name: str
    archives: list[Path]
    index_class: ClassVar[type[ImageIndex]]

    @abstractmethod
    def scan(self) -> Scan:
        """Find all images.

        Raises:
            UserError: something is missing, damaged or empty.
        """

    def classes(self, cache_dir: str) -> list[str]:
        """Name the classes, which is often possible without a scan."""
        return open_index(self, cache_dir).classes

    def places(self, cache_dir: str) -> list[Path]:
        """Say where the index may be kept: beside the data, or where :meth:`place_of_mine` is."""
        beside = self.root / f".index-{self.name}.safetensors"
        return [beside, self.place_of_mine(cache_dir, os.path.realpath(self.root))]

    def place_of_mine(self, cache_dir: str, root: str) -> Path:
        """Say where in ``cache_dir``, or the user's own when empty, the index of the data in ``root`` is kept."""
        digest = hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()
        return folder_of_mine(cache_dir) / f"index-{digest}-{self.name}.safetensors"

    def stamp(self, path: Path) -> list:
        """Note what changes when a file, or the list of files in a folder, does; or when a new one appears.

        Returns:
            its path relative to the root, a time in nanoseconds, and its size.
        """
        try:
            status = path.stat()
        except OSError:
            return [os.path.relpath(path, self.root), 0, -1]
        size = 0 if path.is_dir() else status.st_size
        return [os.path.relpath(path, self.root), status.st_mtime_ns, size]


def folder_of_mine(cache_dir: str) -> Path:
    """Give the folder below ``cache_dir`` (empty for the user's own) for what can be made again."""
    cache = Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "crossformer-trainer"


def open_index(layout: Layout, cache_dir: str) -> ImageIndex:
    """Open the index of a layout: the one that is kept if the data has not changed since, else a new one.

    It is kept in ``layout.root``; where that cannot be written, in ``cache_dir`` (empty for the user's own).

    Raises:
        UserError: from the scan, or neither place can be written.
    """
    files = layout.places(cache_dir)
    index, _ = _kept(layout, files)
    if index:
        return index
    with _locked(files):  # of the processes of a host one scans; the others find what it has kept
        index, unusable = _kept(layout, files)
        for line in unusable:
            print(f"{line}; the data is indexed anew", file=sys.stderr, flush=True)
        return index or _build(layout, files)


def order(names: list[bytes], labels: np.ndarray) -> np.ndarray:
    """Give the permutation that sorts images by class, then by name: the same for every layout of the same images."""
    return np.lexsort((np.array(names, dtype=bytes), labels))


def _build(layout: Layout, files: list[Path]) -> ImageIndex:
    began = time.time()
    message = f"indexing {layout.root} ({layout.name}), once"
    patience = threading.Timer(SECONDS_WITHOUT_A_WORD, print, [message], {"file": sys.stderr, "flush": True})
    patience.start()
    try:
        scan = layout.scan()
    finally:
        patience.cancel()
    problems = []
    for file in files:
        temporary = temporary_name(file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _save(layout, scan, began, temporary)
            temporary.chmod(0o644)  # whoever can read the data
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            problems.append(f"{file.parent}: {reason_of(error)}")
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        else:
            return load_index(layout.index_class, layout.root, file)[0]
    raise UserError(f"the index cannot be kept ({'; '.join(problems)}); set DATA.CACHE_DIR to a folder with space")


def _save(layout: Layout, scan: Scan, began: float, file: Path) -> None:
    metadata = {
        "version": VERSION,
        "kind": layout.index_class.__name__,
        "classes": json.dumps(scan.classes),
        "archives": json.dumps(scan.archives),
        "sources": json.dumps([layout.stamp(path) for path in scan.sources]),
        "left_out": json.dumps(scan.left_out),
        "began": str(began),
    }
    save_file(scan.arrays, file, metadata={**metadata, "checksum": _checksum(metadata, scan.arrays)})


def _checksum(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def load_index(
    index_class: type[ImageIndex], root: Path, file: Path, checksum: str | None = None
) -> tuple[ImageIndex, dict[str, str]]:
    """Load the index in a file, and what is written beside it; with a ``checksum`` that has been verified, this one.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, another one or of another version; the message is a line about that.
    """
    if not file.is_file():
        raise FileNotFoundError(file)
    try:
        with safe_open(file, framework="pt") as content:  # torch's tensors are views of the mapped file
            metadata = content.metadata() or {}
            arrays = {key: content.get_tensor(key).numpy() for key in content.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"the index {file} is damaged ({error})") from error
    kinds = {kind.__name__ for kind in index_class.__mro__}
    if metadata.get("version") != VERSION or metadata.get("kind") not in kinds:
        raise ValueError(f"the index {file} is of another version")
    said = metadata.pop("checksum", "")
    if said != (checksum or _checksum(metadata, arrays)):
        raise ValueError(f"the index {file} is damaged (its checksum is wrong)")
    index = index_class(root, json.loads(metadata["classes"]), arrays, json.loads(metadata["archives"]), file)
    index.left_out, index.checksum = json.loads(metadata["left_out"]), said
    return index, metadata


def _reopen(
    index_class: type[ImageIndex],
    root: Path,
    file: Path,
    checksum: str,
    classes: list[str],
    labels: np.ndarray | None,
) -> ImageIndex:
    try:
        index = load_index(index_class, root, file, checksum)[0]
    except (OSError, ValueError) as error:
        raise UserError(f"the index {file} was changed during the run; start again") from error
    return index._copy(classes, index.labels if labels is None else labels)


def _kept(layout: Layout, files: list[Path]) -> tuple[ImageIndex | None, list[str]]:
    """Load the first index in ``files`` that is of the data as it is, if any; and say of each why it cannot be used."""
    unusable = []
    for file in files:
        try:
            index, metadata = load_index(layout.index_class, layout.root, file)
        except OSError:  # there is none
            continue
        except ValueError as error:
            unusable.append(str(error))
            continue
        if _is_fresh(layout, index, metadata):
            return index, []
    return None, unusable


def _is_fresh(layout: Layout, index: ImageIndex, metadata: dict[str, str]) -> bool:
    """Tell whether the data has not changed since it was indexed."""
    sources = json.loads(metadata["sources"])
    newest = max((stamp[1] for stamp in sources if stamp[1] < 1e9 * time.time()), default=0) / 1e9
    if newest > float(metadata["began"]) - RACY_SECONDS:
        return False
    if index.archives != [os.path.relpath(path, layout.root) for path in layout.archives]:
        return False
    return all(stamp == layout.stamp(Path(layout.root, stamp[0])) for stamp in sources)


@contextmanager
def _locked(files: list[Path]) -> Iterator[None]:
    """Hold a lock file beside the first of ``files`` that can have one; without any, several processes may scan."""
    handle = None
    for file in files:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # A network file system locks only what is open for writing
            handle = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            break
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
