"""Files of a results folder: written whole or record by record; what cannot be written now is tried again later."""

import os
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

MOST_BYTES_WAITING = 2**24
"""What an :class:`Appender` keeps of what it could not write; older records are given up then."""


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses, for what is renamed to ``path`` once it is whole."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.writing")


def remove_temporaries(*folders: Path) -> None:
    """Remove what killed processes have left in the middle of writing. For the one who may write there."""
    for folder in folders:
        for path in folder.glob(".*.writing"):
            with suppress(OSError):
                path.unlink()


def reason_of(error: BaseException) -> str:
    """An error's reason in a few words."""
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def sync_folder(folder: Path) -> None:
    """New names of files must survive a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block has ended well. Makes its folder.

    Raises:
        OSError: it cannot be written. What ``path`` held before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Let ``path`` hold either what it held before or all of ``data``; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


class NotWritten(UserError):
    """``path`` could not be written for a ``reason``; ``meanwhile`` says what holds until then, or what to do."""

    def __init__(self, path: Path, reason: str, meanwhile: str):
        super().__init__(f"{path} cannot be written: {reason}; {meanwhile}")
        self.path, self.reason, self.meanwhile = path, reason, meanwhile


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Raise :class:`NotWritten` where the block cannot write ``path``; ``remedy`` is what the user can do."""
    try:
        yield
    except OSError as error:
        raise NotWritten(path, reason_of(error), remedy) from error


class Unwritten:
    """The files that could not be written so far. Each problem is said once, not at each try.

    Args:
        say: what to do with a line for the person who watches.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.say = say
        self._reasons: dict[Path, str] = {}
        self._given_up: dict[Path, str] = {}

    def failed(self, problem: NotWritten) -> None:
        """A file could not be written."""
        if problem.path not in self._reasons:
            self._reasons[problem.path] = problem.reason  # before it is said, for the log's own file may be the one
            self.say(f"error: {problem}")

    def written(self, path: Path) -> None:
        """``path`` holds all that it should."""
        self._reasons.pop(path, None)

    def give_up(self, path: Path, what: str) -> None:
        """``what`` of ``path`` is lost for good."""
        if path not in self._given_up:
            self.say(f"error: {path}: {what}")
        self._given_up[path] = what

    def check(self) -> None:
        """Raise a :class:`UserError` that names every file that lacks something."""
        if self._reasons:
            files = ", ".join(f"{path} ({reason})" for path, reason in self._reasons.items())
            raise UserError(
                f"cannot be written: {files}; free some space: the same command again writes what is missing"
            )
        if self._given_up:
            raise UserError("; ".join(f"{path}: {what}" for path, what in self._given_up.items()))


class WholeFile:
    """A small file that is written once, and again when somebody has removed it. Its writing never raises."""

    def __init__(self, path: Path, data: bytes, unwritten: Unwritten):
        self.path = path
        self._data = data
        self._unwritten = unwritten
        self._written = False
        self.write()

    def write(self) -> None:
        """Write it if it is not there."""
        if self._written and self.path.exists():
            return
        try:
            write_whole(self.path, self._data)
        except OSError as error:
            self._unwritten.failed(NotWritten(self.path, reason_of(error), "it is tried again"))
        else:
            self._written = True
            self._unwritten.written(self.path)


class Appender:
    """A file that grows by records, each of which another process may read at once. Its writing never raises.

    What cannot be written is kept, up to MOST_BYTES_WAITING, and goes first at the next chance. The file may be removed
    meanwhile: it is made again, with its folder.

    Args:
        path: the file; it need not exist.
        unwritten: is told when it cannot be written.
        header: what the file begins with.
    """

    def __init__(self, path: Path, unwritten: Unwritten, header: bytes = b""):
        self.path = path
        self._unwritten = unwritten
        self._header = header
        self._waiting: deque[bytes] = deque()
        self._was_there = False
        self._lost = 0

    def add(self, record: bytes) -> None:
        """Let the file grow by this."""
        if record:
            self._waiting.append(record)
        self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        try:
            handle = self._open()
            try:
                while self._waiting:
                    written = os.write(handle, self._waiting[0])
                    if written < len(self._waiting[0]):  # the next try goes on in the middle of the record
                        self._waiting[0] = self._waiting[0][written:]
                    else:
                        self._waiting.popleft()
            finally:
                os.close(handle)
        except OSError as error:
            self._keep_within_bounds()
            self._unwritten.failed(NotWritten(self.path, reason_of(error), "it is kept in memory and tried again"))
        else:
            self._unwritten.written(self.path)

    def waiting(self) -> bytes:
        """What could not be written so far."""
        return b"".join(self._waiting)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND
        try:
            handle = os.open(self.path, flags)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, flags | os.O_CREAT, 0o666)
            if self._header:
                self._waiting.appendleft(self._header)
            if self._was_there:
                self._was_there = False  # what is said now may go to this very file
                self._unwritten.say(f"warning: {self.path} was removed; it is made again, without what it held")
        self._was_there = True
        return handle

    def _keep_within_bounds(self) -> None:
        while len(self._waiting) > 2 and sum(map(len, self._waiting)) > MOST_BYTES_WAITING:
            del self._waiting[1]  # the first may be in the file by half
            self._lost += 1
            self._unwritten.give_up(self.path, f"{self._lost:,} records could not be written, nor be kept in memory")
