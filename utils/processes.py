"""Signals that ask a run to stop, and processes that end with the one that has started them."""

import ctypes
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
CTRL_C_STATUS = 130
"""The exit status of what Ctrl-C has ended, as shells have it."""

PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """Let the kernel send this process the signal ``number`` when its parent has ended, however that came about.

    On Linux; elsewhere a process whose parent was killed is left to find that out. Source: prctl(2).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
