"""Start a run as torchrun does, and end it as one process would.

    python scripts/launch.py --nproc_per_node 8 main.py --cfg configs/small.yaml --data-path /imagenet

It takes what torchrun takes. A signal goes to the ranks, which save and end; torchrun would take that for a failure and
print a traceback. Exit status 0: done, or stopped by SIGTERM, SIGUSR1 or SIGHUP; 130: stopped by Ctrl-C; 3: a host or
a process was lost, or hangs; 2: an error of the user's; 1: a rank has failed otherwise. It has said why.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# Read while torch is imported. Its warnings about a host that is gone fill pages
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.processes import CTRL_C_STATUS, PEER_LOST_STATUS, STOP_SIGNALS, USER_ERROR_STATUS

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_END = 35
"""Torchrun gives the other ranks of a host 30 to end in."""


def ranks() -> list[int]:
    """The processes that this one has started: from the kernel's list of all, or where it has none from ``ps``."""
    if not Path("/proc/self/stat").exists():
        lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [map(int, line.split()) for line in lines.splitlines()]
        return [process for process, parent in pairs if parent == os.getpid()]
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(entry.name))
    return found


def end_after_a_rank(endpoint: str) -> NoReturn:
    """End this process some time after a rank has failed: torchrun waits for hours where the network is gone."""
    while True:
        try:
            child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # and torchrun waits for it as well
        except ChildProcessError:  # none yet
            child = None
        if child and child.si_status:
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    time.sleep(SECONDS_TO_END)
    print(f"error: {endpoint} gives no answer any more; look at that host", file=sys.stderr, flush=True)
    os._exit(USER_ERROR_STATUS if child.si_status == USER_ERROR_STATUS else PEER_LOST_STATUS)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    got: list[int] = []

    def status() -> int:
        return CTRL_C_STATUS if signal.SIGINT in got else 0

    def hand_on(number: int, frame) -> None:
        got.append(number)
        started = ranks()
        for process in started:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        if not started:  # none yet, or none any more: there is nothing to wait for
            sys.exit(status())

    given = parse_args(arguments)
    given.signals_to_handle = "SIGQUIT"  # of the rest torchrun is not to know
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, hand_on)
    if not given.max_restarts and ":" not in given.nnodes:  # else it may start them again
        threading.Thread(target=end_after_a_rank, args=[given.rdzv_endpoint], daemon=True).start()
    try:
        run(given)
    except ChildFailedError as error:
        logging.getLogger(__name__).error("%s", error)
        if error.get_first_failure()[1].exitcode == USER_ERROR_STATUS:  # and torchrun has ended the others
            return USER_ERROR_STATUS
        lost = any(failure.exitcode == PEER_LOST_STATUS for failure in error.failures.values())
        return PEER_LOST_STATUS if lost else 1
    except RendezvousError as error:
        if got:
            return status()
        reason = str(error).partition("\n")[0]
        print(f"error: {given.rdzv_endpoint} gives no answer any more ({reason}); look at that host", file=sys.stderr)
        return PEER_LOST_STATUS
    return status()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
