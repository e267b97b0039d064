"""What the ranks tell each other whatever their main threads are doing: signs of life, and that one is to stop."""

import json
import os
import re
import threading
import time
from contextlib import suppress
from typing import Protocol

from utils.distributed import (
    AgreedError,
    PeerLostError,
    is_of_the_network,
    name_of,
    rank,
    shared_store,
    world_size,
)
from utils.errors import UserError

SECONDS_BETWEEN_TURNS = 1.0
SECONDS_TO_TELL = 3
SECONDS_TO_COMPARE = 10
"""So long it may take to ask the store who lives, where the network is what has failed."""
STOP = "stop"
ERROR = "error"
LEFT = "has left"
"""The activity of a rank that ends because of another one."""


class Request(Protocol):
    """The number of a signal that has come, 0 for none; and whether every rank knows of it."""

    signal: int
    agreed_by_all: bool


class Bulletin:
    """A thread that publishes what this rank is doing, and sends this process the signal that another rank has got.

    It may hang when the network does, so nobody waits for it. An error that comes of another rank's end leaves it as a
    :class:`~utils.distributed.PeerLostError` that names that rank, or as what that rank has ended with if it is
    an error of the user's.

    Args:
        stop: this rank's own request; None where nothing stops before it is done.

    Attributes:
        step: steps that are done.
        activity: what is being done now.
    """

    def __init__(self, stop: Request | None = None):
        self.stop = stop
        self.step, self.activity = 0, "starting"
        self._turns = 0
        self._done, self._told = threading.Event(), threading.Event()
        self._store = shared_store()

    def __enter__(self) -> "Bulletin":
        if self._store:
            threading.Thread(target=self._publish, name="bulletin", daemon=True).start()
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if error is None:  # else the others may have something to say of it
            self._done.set()
        elif self._store and self.stop and self.stop.signal and not self.stop.agreed_by_all:
            self._told.wait(SECONDS_TO_TELL)
            time.sleep(1.5 * SECONDS_BETWEEN_TURNS)  # so long it takes the others to look
        elif self._store and isinstance(error, UserError) and not isinstance(error, AgreedError):
            with suppress(RuntimeError):
                self._store.set(ERROR, f"{name_of(rank())}: {error}")
        elif self._store and is_of_the_network(error):
            with suppress(RuntimeError):
                if self._store.check([ERROR]):  # it has ended by itself, and would again
                    raise AgreedError(self._store.get(ERROR).decode()) from error
            raise PeerLostError(self._who_is_gone(error)) from error

    def _who_is_gone(self, error: BaseException) -> str:
        """Name the ranks that give no sign of life any more, and do not just leave as this one does."""
        self.activity = LEFT
        silent: list[int] = []
        asks = threading.Thread(target=lambda: silent.extend(self.silent() or [0]), daemon=True)
        asks.start()
        asks.join(SECONDS_TO_COMPARE)  # where the store does not answer it is rank 0's host that is gone
        gone = ", ".join(map(name_of, silent or [0]))
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        reason = re.sub(r"^\[\S+\] ", "", reason).partition(". ")[0]  # gloo begins with a line of its source
        return f"{gone} is gone, or the network to it ({reason}); look at what it said last"

    def silent(self) -> list[int]:
        """Give the ranks whose sign of life does not change; it takes seconds, or for ever."""
        with suppress(RuntimeError):  # the store is gone
            before = self.lives()
            time.sleep(2.5 * SECONDS_BETWEEN_TURNS)
            after = self.lives()
            return [r for r, life in after.items() if r != rank() and life == before[r] and life[2] != LEFT]
        return [0]

    def lives(self) -> dict[int, list]:
        """Of each rank the number of its sign of life, its step and activity. It may take for ever."""
        if not self._store:
            return {}
        names = {other: f"life of rank {other}" for other in range(world_size())}
        return {
            other: json.loads(self._store.get(name)) if self._store.check([name]) else [0, 0, "starting"]
            for other, name in names.items()
        }

    def _publish(self) -> None:
        assert self._store is not None
        with suppress(RuntimeError):  # the store is gone, and with it the launcher or rank 0
            while not self._done.wait(SECONDS_BETWEEN_TURNS):
                self._turns += 1
                self._store.set(f"life of rank {rank()}", json.dumps([self._turns, self.step, self.activity]))
                if self.stop is None:
                    continue
                if self.stop.signal and not self._told.is_set():
                    self._store.set(STOP, str(int(self.stop.signal)))
                    self._told.set()
                elif not self.stop.signal and self._store.check([STOP]):
                    self._told.set()
                    os.kill(os.getpid(), int(self._store.get(STOP)))
