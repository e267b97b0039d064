"""Signals that ask a run to stop, and processes that end with the one that has started them."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from utils.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
CTRL_C_STATUS = 130
"""The exit status of what Ctrl-C has ended, as shells have it."""

USER_ERROR_STATUS = 2
"""That of a run which would end in the same way if it were started again."""

PEER_LOST_STATUS = 3
"""That of a run which has lost one of its processes or hangs: to start it again is worth it."""

PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """Let the kernel send this process the signal ``number`` when its parent has ended, however that came about.

    On Linux; elsewhere a process whose parent was killed is left to find that out. Source: prctl(2).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def place() -> str:
    """Where process ids mean the same: this boot of this machine, and within it the container. Empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def begin_worker() -> None:
    """Make the process that calls this a worker of its parent: it ends with it, and uses one core."""
    import torch  # not above: whoever asks for a list or makes a mistake need not wait for it

    end_with_parent(signal.SIGKILL)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a live bar's stand-ins hold a lock that was copied locked
    torch.set_num_threads(1)


@contextmanager
def forked(function: Callable, processes: int, if_killed: str) -> Iterator[Callable[[Any], Future]]:
    """Fork worker processes, which share all that ``function`` refers to; yields what has one call it with an argument.

    Raises:
        UserError: one was killed; ``if_killed`` is the message.
    """
    pool = ProcessPoolExecutor(processes, get_context("fork"), _begin_forked, (function,))
    try:
        yield lambda argument: pool.submit(_call_function, argument)
    except BrokenProcessPool as error:
        raise UserError(if_killed) from error
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable
"""Of the process that has been forked."""


def _begin_forked(function: Callable) -> None:
    global _function
    _function = function
    begin_worker()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and without a word


def _call_function(argument: Any) -> Any:
    return _function(argument)
