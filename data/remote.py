"""Tar shards in object storage: ``s3://``, ``gs://``, ``https://`` and whatever else fsspec knows.

Each image is one range of its shard, read by the offsets of the index. Credentials and endpoints come from the usual
places (environment variables, configuration files, fsspec's own ``FSSPEC_S3_ENDPOINT_URL``).
"""

import errno
import functools
import io
import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import fsspec
import numpy as np

from data.index import ImageIndex, Scan, load_index, open_index
from data.layouts import SPLITS, words_of
from data.shard_cache import ShardCache
from data.tar import BLOCK, TarIndex, TarLayout, TarredImage, check_uncompressed, images_in
from utils.errors import UserError
from utils.files import reason_of

PATIENCE_SECONDS = 600
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
SCAN_THREADS = 8
READ_AHEAD_BYTES = 2**23
"""While a shard is listed: larger than its images, or each would cost a request of its own."""
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, NotImplementedError)
"""Errors that come again however often one tries."""
FINAL_BY_NAME = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
MAY_PASS = (408, 429)
"""Of the answers 400 to 499 of a web server, those after which it may be asked again."""
VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "mtime")
"""What each protocol calls that which differs between two states of a file."""
Result = TypeVar("Result")


def is_url(path: str) -> bool:
    """Tell whether it is an address and not a folder."""
    return "://" in path


def is_web(path: str) -> bool:
    """Tell whether it is an address of a web server."""
    return path.partition("://")[0] in ("http", "https")


@functools.cache
def connected(protocol: str, process: int) -> fsspec.AbstractFileSystem:
    """Give what speaks the protocol, with connections that this process has made itself.

    All are kept: those that a process has of its parent it can neither use nor close.
    """
    return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)


class Store:
    """Object storage below a URL.

    Attributes:
        is_web: whether it is a web server, which at best lists names, and of which nothing can be written.

    Raises:
        UserError: nothing is installed that speaks the protocol.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.is_web = is_web(url)
        try:
            _ = self.system
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: {reason_of(error)}") from error

    @property
    def system(self) -> fsspec.AbstractFileSystem:
        return connected(self.url.partition("://")[0], os.getpid())

    def files(self, folder: str) -> dict[str, list]:
        """List the files in a folder below the URL: name to what changes when the file does. Empty where it is none."""

        def listed() -> list[dict[str, Any]]:
            try:
                return self.system.ls(f"{self.url}/{folder}".rstrip("/"), detail=True)
            except Exception as error:
                if not _is_missing(error):
                    raise
                return []

        entries = persistently(listed, f"{self.url}/{folder}")
        found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}
        return {name: [entry.get("size"), _version_of(entry)] for name, entry in found.items()}

    def stamp(self, path: str) -> list:
        """Ask for what changes when a file does, as :meth:`files` has it.

        Raises:
            UserError: the server does not say how long it is.
        """

        def info() -> dict[str, Any]:
            try:
                return self.system.info(f"{self.url}/{path}")
            except FileNotFoundError as error:  # fsspec says so of a web server that does not answer, too
                raise error.__cause__ or error from None

        entry = persistently(info, f"{self.url}/{path}")
        if entry.get("size") is None:
            raise UserError(f"{self.url}/{path} cannot be read: its server does not say how long it is")
        return [entry["size"], _version_of(entry)]

    def ranges(self, wanted: Sequence[tuple[str, int, int]], patience: float | None = None) -> list[bytes]:
        """Read several ranges at once, each a path, where it begins and how long it is.

        Raises:
            OSError: the storage does not answer.
            UserError: it has no such file, or sends only whole ones.
        """
        done: dict[int, bytes] = {}

        def some() -> list[bytes]:
            left = [number for number in range(len(wanted)) if number not in done]
            paths = [f"{self.url}/{wanted[number][0]}" for number in left]
            starts = [wanted[number][1] for number in left]
            ends = [wanted[number][1] + wanted[number][2] for number in left]
            results = self.system.cat_ranges(paths, starts, ends, on_error="return")
            failure = None
            for number, result in zip(left, results, strict=True):
                if isinstance(result, BaseException):
                    failure = failure or result
                elif len(result) > wanted[number][2]:
                    raise UserError(
                        f"{self.url}/{wanted[number][0]} cannot be read in pieces: its server sends only whole files; "
                        "use one that answers range requests"
                    )
                else:
                    done[number] = result
            if failure:
                raise failure
            return [done[number] for number in range(len(wanted))]

        return persistently(some, self.url, patience)

    def read(self, path: str) -> bytes:
        """Read a small file."""
        return persistently(lambda: self.system.cat_file(f"{self.url}/{path}"), f"{self.url}/{path}")

    def read_if_there(self, path: str) -> bytes | None:
        """Read a small file; None where there is none."""

        def read() -> bytes | None:
            try:
                return self.system.cat_file(f"{self.url}/{path}")
            except Exception as error:
                if not _is_missing(error):
                    raise
                return None

        return persistently(read, f"{self.url}/{path}")

    def write(self, path: str, data: bytes) -> None:
        """Write a small file."""
        persistently(lambda: self.system.pipe_file(f"{self.url}/{path}", data), f"{self.url}/{path}")

    def put(self, file: Path, path: str) -> None:
        """Copy a local file there; it appears whole or not at all."""
        persistently(lambda: self.system.put_file(str(file), f"{self.url}/{path}"), f"{self.url}/{path}")


def persistently(do: Callable[[], Result], where: str, patience: float | None = None) -> Result:
    """Do something again and again, with longer and longer pauses, until it is done.

    Raises:
        UserError: it fails in a way that no patience mends.
        OSError: it has failed for so many seconds, PATIENCE_SECONDS if not said.
    """
    patience = PATIENCE_SECONDS if patience is None else patience
    began, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            return do()
        except UserError:
            raise
        except Exception as error:  # each library behind it has errors of its own
            if _is_final(error):
                bare = isinstance(error, FileNotFoundError) and not error.strerror  # it says only which
                reason = f"there is no {error}" if bare else reason_of(error)
                raise UserError(f"{where} cannot be reached: {reason}") from error
            if time.monotonic() - began > patience:
                raise OSError(errno.EIO, f"no answer for {patience} s ({reason_of(error)})") from error
            if pause == FIRST_PAUSE_SECONDS:
                print(f"{where} does not answer ({reason_of(error)}); trying on", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _is_final(error: Exception) -> bool:
    """Tell whether an error comes again however often one tries."""
    status = _status_of(error)
    refused = 400 <= status < 500 and status not in MAY_PASS
    return refused or isinstance(error, FINAL) or type(error).__name__ in FINAL_BY_NAME


def _is_missing(error: Exception) -> bool:
    """Tell whether the storage says that there is no such thing; of a bucket that may not be listed, by 403."""
    return isinstance(error, FileNotFoundError) or _status_of(error) in (403, 404)


def _status_of(error: Exception) -> int:
    """Give a web server's answer; 0 for other errors."""
    status = getattr(error, "status", 0)
    return status if isinstance(status, int) else 0


def _version_of(entry: dict[str, Any]) -> str:
    """Take from a listing what differs between two states of a file."""
    return str(next((entry[key] for key in VERSIONS if entry.get(key)), ""))


class RemoteTarIndex(TarIndex):
    """Images in the shards below a URL, which is ``root``."""

    _cache: ShardCache | None = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._store = Store(str(self.root))
        self._expected: dict[int, bytes | Exception] = {}

    def cache_in(self, folder: Path, limit: int) -> None:
        """Keep images on the disk of this host, up to ``limit`` bytes.

        Raises:
            UserError: nothing can be kept there.
        """
        try:
            self._cache = ShardCache(folder, self.checksum, self._archive, self._offset, self._length, limit)
        except OSError as error:
            raise UserError(f"DATA.CACHE_DIR {folder} cannot keep images: {reason_of(error)}") from error

    def archive(self, i: int) -> str:  # type: ignore[override]
        return f"{self.root}/{self.archives[self._archive[i]]}"

    def bytes_at(self, i: int, offset: int, length: int) -> bytes:
        # For a name to be told, as when the image itself has been waited for in vain: not once more
        return self._store.ranges([(self.archives[self._archive[i]], offset, length)], patience=0)[0]

    def expect(self, numbers: Sequence[int]) -> None:
        """Fetch images that are about to be read, all at once.

        It waits for them, so that nothing is fetched while samples are made: before they ask again, libraries draw from
        Python's generator how long to wait, and a sample would get other random numbers.
        """
        self._expected = {}
        try:
            self._expected |= self._fetch([*dict.fromkeys(numbers)])
        except (OSError, UserError) as error:  # for whoever reads them
            self._expected = dict.fromkeys(numbers, error)

    def read(self, i: int) -> bytes:
        found = self._expected.get(i)
        if isinstance(found, Exception):
            raise found
        return self._fetch([i])[i] if found is None else found

    def _fetch(self, numbers: list[int]) -> dict[int, bytes]:
        """Read images from the cache, or else from the storage."""
        found = {i: self._cache.get(i) if self._cache else None for i in numbers}
        missing = [i for i in numbers if found[i] is None]
        wanted = [
            (self.archives[self._archive[i]], int(self._offset[i]) - BLOCK, BLOCK + int(self._length[i]))
            for i in missing
        ]
        for i, data in zip(missing, self._store.ranges(wanted) if wanted else [], strict=True):
            found[i] = content = self.content(i, data, int(self._length[i]))
            if self._cache:
                self._cache.put(i, content)
        return cast(dict[int, bytes], found)

    def read_ahead(self, part: int, parts: int) -> int:
        raise UserError("DATA.CACHE_MODE is for files at hand; keep images of object storage with DATA.CACHE_GB")


class RemoteTarLayout(TarLayout):
    """The tar files ``archives`` of a split, paths below the store's URL, each with what changes when it does."""

    index_class = RemoteTarIndex

    def __init__(self, store: Store, split: str, archives: dict[str, list]):
        self.store, self.name, self.stamps = store, f"{split}-tar", archives
        self.root = cast(Path, store.url)
        self.archives = cast(list[Path], [f"{store.url}/{path}" for path in archives])

    def places(self, cache_dir: str) -> list[Path]:
        """Only on this host."""
        return [self.place_of_mine(cache_dir, str(self.root))]

    def stamp(self, path: Path) -> list:
        """Note what the listing says of a shard: its version in place of a time."""
        name = os.path.relpath(path, self.root)
        size, version = self.stamps.get(name, [-1, ""])
        return [name, zlib.crc32(version.encode()), size]

    def _folder_of_shards(self, left_out: Counter[str]) -> list[Path]:
        return []  # the listing is looked at anyway

    def scan(self) -> Scan:
        """Take the index that was kept beside the shards when they were made, or list the images of all shards."""
        return self._published() or super().scan()

    def listed(self, left_out: Counter[str]) -> Iterator[list[TarredImage]]:
        """List several shards at a time: most of it is waiting."""
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            for images, of_shard in pool.map(self._list, self.stamps):
                left_out.update(of_shard)
                yield images

    def _list(self, path: str) -> tuple[list[TarredImage], Counter[str]]:
        left_out: Counter[str] = Counter()
        with io.BufferedReader(ShardFile(self.store, path, self.stamps[path][0]), READ_AHEAD_BYTES) as file:
            where = cast(Path, f"{self.root}/{path}")
            check_uncompressed(file, where)
            return images_in(file, where, left_out), left_out

    @property
    def published(self) -> str:
        """Where beside the shards their index is, if anybody has put it there."""
        return name_of_index(self.name)

    def _published(self) -> Scan | None:
        index, metadata = read_index(self.store, self.published) or (None, {})
        if index is None or index.archives != [*self.stamps]:
            return None
        sizes = {path: size for path, _, size in json.loads(metadata["sources"])}
        if any(sizes.get(path) != stamp[0] for path, stamp in self.stamps.items()):
            return None
        return Scan(index.classes, index.arrays, index.archives, self.archives, dict(index.left_out))


def name_of_index(layout: str) -> str:
    """Say what the index of a layout is called beside its shards."""
    return f".index-{layout}.safetensors"


def read_index(store: Store, name: str) -> tuple[ImageIndex, dict[str, str]] | None:
    """Read an index that is kept beside its shards; None where there is none that can be used."""
    content = store.read_if_there(name)
    if content is None:
        return None
    with TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(content)
        try:
            index, metadata = load_index(RemoteTarIndex, cast(Path, store.url), file)
        except ValueError:
            return None  # of another version, say
        index.arrays = {key: np.array(array) for key, array in index.arrays.items()}  # the file goes away
    return index, metadata


class ShardFile(io.RawIOBase):
    """A file in a store, for reading in pieces as large as whoever buffers it asks for."""

    def __init__(self, store: Store, path: str, size: int):
        self._store, self._path, self._size, self._position = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        if length:
            try:
                data = self._store.ranges([(self._path, self._position, length)])[0]
            except OSError as error:
                raise UserError(f"{self._store.url}/{self._path} cannot be read: {reason_of(error)}") from error
            buffer[: len(data)] = data
            self._position += len(data)
            return len(data)
        return 0


def find_remote_layout(store: Store, split: str) -> RemoteTarLayout | None:
    """Find the shards of ``split`` (train or val) below a URL; None where there are none."""
    for folder in SPLITS[split]:
        there = {f"{folder}/{name}": stamp for name, stamp in store.files(folder).items() if name.endswith(".tar")}
        beside = {
            name: stamp
            for name, stamp in (store.files("") if not there else {}).items()
            if name.endswith(".tar") and folder in words_of(name)
        }
        found = dict(sorted((there or beside).items()))
        if store.is_web:
            found = _ask_for_stamps(store, [*found] or _names_in_index(store, f"{folder}-tar"))
        if found:
            return RemoteTarLayout(store, folder, found)
    return None


def _names_in_index(store: Store, layout: str) -> list[str]:
    """Name the shards of a web server that lists nothing, if their index is there."""
    index, _ = read_index(store, name_of_index(layout)) or (None, {})
    return index.archives if index else []


def _ask_for_stamps(store: Store, names: list[str]) -> dict[str, list]:
    """Get size and version of each shard from a web server, whose listing does not have them.

    Raises:
        UserError: it does not tell them, or sends only whole files.
    """
    if names:
        store.ranges([(names[0], 0, 1)])
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        return dict(zip(names, pool.map(store.stamp, names), strict=True))


def publish_index(store: Store) -> None:
    """Put the index of each split beside its shards, so that no host has to list them."""
    for split in SPLITS:
        layout = find_remote_layout(store, split)
        if layout and layout.published not in store.files(""):
            with TemporaryDirectory() as folder:
                store.put(open_index(layout, folder).file, layout.published)
