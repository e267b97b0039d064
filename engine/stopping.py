"""Stopping a run from outside without losing a step: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C."""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_CTRL_C_SECONDS = 2
"""torchrun hands on the Ctrl-C that the terminal has sent to all processes: that is no second one."""


class StopRequest:
    """Between entering and leaving it, a signal asks the run to stop; all ranks do so after the same step.

    The second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}
        self._asked = torch.zeros(1, dtype=torch.int32)
        self._answer: dist.Work | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        if self._answer and error[0] is None:  # else it may never come
            self._answer.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() - self._since > SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = number, time.monotonic()

    def agreed(self) -> bool:
        """Whether to stop now. Every rank must ask after every step, and all get the same answer.

        The ranks exchange what they know while the next step runs, so that nobody waits: with several, a request
        takes effect one step later.
        """
        if not dist.is_initialized():
            return bool(self.signal)
        stop = False
        if self._answer:
            self._answer.wait()
            stop = bool(self._asked)
            if not self.signal and stop:
                self.signal = int(self._asked)
        self._asked.fill_(self.signal)
        self._answer = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)
        return stop

    @property
    def name(self) -> str:
        """What asked for it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name
