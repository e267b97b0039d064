"""Ends a run that hangs, and says which rank did not arrive."""

import json
import os
import sys
import threading
import time

import torch.distributed as dist

from utils.distributed import rank, world_size

CHECKS_PER_TIMEOUT = 20
EXIT_STATUS = 3


class Watchdog:
    """Between entering and leaving it, the process ends when :meth:`beat` has not been called for ``minutes``.

    A collective waits for the rank that does not arrive, so all ranks end up here at about the same time. A thread of
    each publishes signs of life and what the rank is doing, from which the others tell who it was. 0 turns it off.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self._beat = time.monotonic()
        self._step = 0
        self._done = threading.Event()
        self._store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        self.activity = "starting"

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()

    def beat(self, step: int) -> None:
        """``step`` steps are done."""
        self._step, self._beat = step, time.monotonic()

    def _watch(self) -> None:
        pause, sign = self._seconds / CHECKS_PER_TIMEOUT, 0
        while not self._done.wait(pause):
            sign += 1
            if self._store:
                self._store.set(f"life of rank {rank()}", json.dumps([sign, self._step, self.activity]))
            if time.monotonic() - self._beat > self._seconds:
                print(f"error (rank {rank()}): {self._diagnosis(2.5 * pause)}", file=sys.stderr, flush=True)
                os._exit(EXIT_STATUS)  # the main thread cannot be reached

    def _diagnosis(self, patience: float) -> str:
        waited = f"nothing has happened for {self._seconds / 60:g} minutes (TRAIN.HANG_MINUTES)"
        if not self._store:
            return f"{waited} while {self.activity} after step {self._step:,}"
        before = self._lives()
        self._done.wait(patience)
        after = self._lives()
        after[rank()] = [-1, self._step, self.activity]
        silent = [other for other, life in after.items() if life == before[other]]
        if silent:
            return (
                f"{waited}: rank {', '.join(map(str, silent))} gives no sign of life; look at that process and its host"
            )
        reading = [other for other, (_, _, activity) in after.items() if activity == "loading data"]
        if reading:
            return (
                f"{waited}: rank {', '.join(map(str, reading))} waits for data; look at its loader processes and disk"
            )
        return f"{waited}: all ranks are {self.activity} after step {self._step:,}; look at the GPUs and the network"

    def _lives(self) -> dict[int, list]:
        names = {other: f"life of rank {other}" for other in range(world_size())}
        return {
            other: json.loads(self._store.get(name)) if self._store.check([name]) else [0, 0, "starting"]
            for other, name in names.items()
        }
