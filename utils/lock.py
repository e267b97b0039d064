"""A lock on a results folder, so that two runs never write into one.

It is a file that says who holds it, with a count that grows while its holder lives. No file system has to lock anything
(network drives often cannot, and a forked loader process would hold such a lock on when its trainer is killed), and no
clocks are compared. A lock that was left behind by a killed process is taken over.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.distributed import agreement, is_main
from utils.errors import UserError
from utils.files import reason_of
from utils.processes import place

NAME = ".lock"
BEAT_SECONDS = 2.0
WATCH_SECONDS = 15.0
"""A holder on another host is dead when its count has not grown for so long."""
DYING_SECONDS = 5.0
"""How long a holder on this host may take to end: torchrun starts ranks again while the old ones go."""
POLL_SECONDS = 0.1


@contextmanager
def hold(folder: Path) -> Iterator["Lock"]:
    """Hold ``folder`` for one run: rank 0 does, and every rank raises the error of a folder that is in use.

    Raises:
        UserError: another run is there; the folder is as it was.
    """
    lock = Lock(folder)
    with agreement():
        if is_main():
            lock.take()
    try:
        yield lock
    finally:
        lock.release()


class Lock:
    """The right to write into a folder; before :meth:`take` and on ranks other than 0 it is nobody's.

    ``.lock`` names its holder under an id of its own. Whoever finds that holder dead creates the lock's successor,
    ``.lock.ID``, which only one can, and renames it to ``.lock``.

    Attributes:
        note: says from whom it was taken over, if from anybody.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.note = ""
        self._path = folder / NAME
        self._me: dict[str, str | int] = {}
        self._beats = 0
        self._file: int | None = None
        self._done, self._checking = threading.Event(), threading.Lock()
        self._made: list[Path] = []

    def take(self) -> None:
        """Wait for nobody but one who is ending.

        Raises:
            UserError: another run holds the folder, or it cannot be written.
        """
        self._me = {
            "id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(),
            "since": time.strftime("%F %T"), "place": place(), "started": _started(os.getpid()),
        }  # fmt: skip
        try:
            self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._try_to_take():
                time.sleep(POLL_SECONDS)
        except OSError as error:
            raise UserError(
                f"results folder {self.folder} cannot be written: {reason_of(error)}; choose another --output"
            ) from error
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise a :class:`UserError` if somebody else has taken the folder over meanwhile.

        That happens to a process that was stopped for so long that another host took it for dead. One whose folder was
        removed takes it again.
        """
        with self._checking:
            if self._file is None:
                return
            try:
                holder = _read(self._path)
                if holder is None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._create(self._path)
                    return
            except FileExistsError:
                holder = _read(self._path)
            except OSError:  # a full disk, or a drive that does not answer now: nobody else can have taken it
                return
            if holder is not None and holder["id"] != self._me["id"]:
                raise UserError(
                    f"{self.folder} was taken over by {_describe(holder)}, while this process gave no sign of life"
                )

    def release(self) -> None:
        """Leave the folder to others; one that was made for nothing is removed."""
        if self._file is None:
            return
        self._done.set()
        self._thread.join(BEAT_SECONDS)  # it would make the file again
        with suppress(OSError):
            holder = _read(self._path)
            if holder is not None and holder["id"] == self._me["id"]:
                self._path.unlink()
        file, self._file = self._file, None
        if not self._thread.is_alive():  # a number that is closed may soon be another file's
            os.close(file)
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _try_to_take(self) -> bool:
        """Whether it is ours now; False to look again."""
        first = _read(self._path)
        if first is None:
            return self._created(self._path)
        path, holder = self._path, first
        while successor := _read(self._successor_of(holder)):  # was killed before its name came into .lock
            path, holder = self._successor_of(holder), successor
        if not _has_ended(path, holder, self.folder):
            return False
        mine = self._successor_of(holder)
        if not self._created(mine):
            return False
        now = _read(self._path)
        if now is None or now["id"] != first["id"]:  # somebody was faster, and this successor comes too late
            mine.unlink(missing_ok=True)
            return False
        os.replace(mine, self._path)  # the lock has a new holder and the old one's successor is gone, in one instant
        for left in self.folder.glob(f"{NAME}.*"):
            left.unlink(missing_ok=True)
        self.note = f"taken over from {_describe(holder)}, which has ended without saying so"
        return True

    def _successor_of(self, holder: dict) -> Path:
        return self.folder / f"{NAME}.{holder['id']}"

    def _created(self, path: Path) -> bool:
        try:
            self._create(path)
        except FileExistsError:
            return False
        return True

    def _create(self, path: Path) -> None:
        """Write our name into a file that does not exist yet."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.pwrite(file, self._content(), 0)
        except OSError:
            os.close(file)
            path.unlink()
            raise
        self._file = file  # an old one stays open, for the other thread may be writing there

    def _content(self) -> bytes:
        """Always of the same length, so that the count grows in its place."""
        return json.dumps({**self._me, "beats": f"{self._beats:010}"}).encode() + b"\n"

    def _live(self) -> None:
        """Let the count grow, in the file that we have made and not in one that has taken its place."""
        while not self._done.wait(BEAT_SECONDS):
            self._beats += 1
            with suppress(OSError, UserError):  # the next beat may do; whoever writes checks for itself
                file = self._file  # release() does not wait for a drive that hangs
                if file is None:
                    return
                os.pwrite(file, self._content(), 0)
                os.fdatasync(file)  # other hosts are to see it
                self.check()


def _read(path: Path) -> dict | None:
    """Who holds the lock in this file; None if there is none."""
    try:
        with open(path, "rb") as file:
            content = file.read()
            changed = os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        holder = json.loads(content)
        return {key: holder[key] for key in ("id", "host", "pid", "since", "place", "started", "beats")}
    except (ValueError, KeyError, TypeError):  # killed before it was written
        return {"id": f"unknown-{changed}", "host": "an unknown host", "pid": 0, "since": "", "place": "", "beats": ""}


def _has_ended(path: Path, holder: dict, folder: Path) -> bool:
    """Whether the holder is dead; False if the lock has changed hands meanwhile.

    Raises:
        UserError: it lives.
    """
    same_place = bool(holder["place"]) and holder["place"] == place()
    if not same_place:
        print(f"{folder} is held by {_describe(holder)}: looking for a sign of life, {WATCH_SECONDS:g} s", flush=True)
    began = changed = time.monotonic()
    beats, signs = holder["beats"], 0
    while True:
        now = _read(path)
        if now is None or now["id"] != holder["id"]:
            return False
        if same_place:
            if _started(holder["pid"]) != holder["started"]:
                return True
            lives = time.monotonic() - began > DYING_SECONDS
        else:
            if now["beats"] != beats:
                beats, changed, signs = now["beats"], time.monotonic(), signs + 1
            if time.monotonic() - changed > WATCH_SECONDS:
                return True
            lives = signs > 1
        if lives:
            raise UserError(
                f"{folder} is in use by {_describe(holder)}; wait for it or stop it, or choose another --tag"
            )
        time.sleep(POLL_SECONDS)


def _describe(holder: dict) -> str:
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def _started(pid: int) -> str:
    """When a process of this place has started, in the kernel's words; empty if it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    state, started = fields[0].decode(), fields[19].decode()  # the third and the twenty-second; the second is its name
    return "" if state in "ZX" else started
