"""Ends a run that hangs, says which rank did not arrive, and where every thread was."""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

from utils.bulletin import SECONDS_BETWEEN_TURNS, Bulletin
from utils.distributed import name_of, rank

CHECKS_PER_TIMEOUT = 20
LAST_WORDS_SECONDS = 20
EXIT_STATUS = 3


class Watchdog:
    """Between entering and leaving it, the process ends when :meth:`beat` has not been called for ``minutes``.

    A collective waits for the rank that does not arrive, so all ranks end up here at about the same time. Time in which
    this process did not run (SIGSTOP, a suspended machine) does not count. The exit depends on nothing: neither on the
    network, which the rank may be cut off from, nor on the disk that what is known is written to. 0 turns it off.

    Args:
        minutes: TRAIN.HANG_MINUTES.
        bulletin: what the other ranks say of themselves.
        folder: where to write the stacks of all threads.
    """

    def __init__(self, minutes: float, bulletin: Bulletin, folder: Path):
        self._seconds = 60 * minutes
        self._idle = 0.0
        self._bulletin = bulletin
        self._folder = folder
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()

    def beat(self, step: int) -> None:
        """``step`` steps are done."""
        self._bulletin.step, self._idle = step, 0.0

    def doing(self, activity: str) -> None:
        """Let the other ranks know what this one is at."""
        self._bulletin.activity = activity

    def _watch(self) -> None:
        pause, then = self._seconds / CHECKS_PER_TIMEOUT, time.monotonic()
        while not self._done.wait(pause):
            now = time.monotonic()
            self._idle += min(now - then, 2 * pause)  # more than that is time in which this thread did not run either
            then = now
            if self._idle > self._seconds:
                last_words = threading.Thread(target=self._speak, daemon=True)
                last_words.start()
                last_words.join(min(LAST_WORDS_SECONDS, self._seconds))
                os._exit(EXIT_STATUS)  # the main thread cannot be reached

    def _speak(self) -> None:
        waited = f"nothing has happened for {self._seconds / 60:g} minutes (TRAIN.HANG_MINUTES)"
        stacks = self._write_stacks()
        said = f"error (rank {rank()}): {waited}"
        # What is known without the others first: it may be all that there is time for
        print(f"{said} while {self._bulletin.activity} after step {self._bulletin.step:,}; {stacks}", file=sys.stderr)
        sys.stderr.flush()
        with suppress(RuntimeError):  # the store may be gone
            self._compare_lives(said)

    def _compare_lives(self, said: str) -> None:
        before = self._bulletin.lives()
        if before:
            time.sleep(2.5 * SECONDS_BETWEEN_TURNS)
            print(f"{said}: {self._diagnosis(before, self._bulletin.lives())}", file=sys.stderr, flush=True)

    def _write_stacks(self) -> str:
        """Write where every thread of this process is; returns a text that says where to find it."""
        path = self._folder / f"stacks_rank_{rank()}.txt"
        try:
            with open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback(cast(TextIO, sys.__stderr__))
            return "where each thread was stands above"
        return f"where each thread was: {path}"

    def _diagnosis(self, before: dict[int, list], after: dict[int, list]) -> str:
        after[rank()] = [-1, self._bulletin.step, self._bulletin.activity]
        silent = [other for other, life in after.items() if life == before[other]]
        if silent:
            return f"{', '.join(map(name_of, silent))} gives no sign of life; look at that process and its host"
        reading = [other for other, (_, _, activity) in after.items() if activity == "loading data"]
        if reading:
            return f"{', '.join(map(name_of, reading))} waits for data; look at its loader processes and disk"
        at = f"{self._bulletin.activity} after step {self._bulletin.step:,}"
        return f"all ranks are {at}; look at the GPUs and the network (docs/clusters.md)"
