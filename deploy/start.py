"""Start Python as the first process of a container, and end with a status that Kubernetes understands.

    python3 deploy/start.py scripts/launch.py --nproc_per_node gpu main.py --cfg configs/small.yaml

Signals are handed on. A training that one has stopped ends with status 0, which Kubernetes would take for done, and
start no other pod: here it is 128 and the signal's number, as of a process that does nothing but die of it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

HANDED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}


def main(command: list[str]) -> int:
    """Run ``python COMMAND`` to its end; returns the exit status."""
    # Held back from the start: of a first process's signals the kernel drops those that it has not asked for
    waited_for = {*HANDED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    child = subprocess.Popen(
        [sys.executable, *command], preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, waited_for)
    )
    stopped_by, ended = 0, {}
    while child.pid not in ended:
        number = signal.sigwait(waited_for)
        if number == signal.SIGCHLD:
            ended = dict(collected())
        else:
            stopped_by = stopped_by or number
            os.kill(child.pid, number)
    status = os.waitstatus_to_exitcode(ended[child.pid])
    if status < 0:
        return 128 - status
    return 128 + stopped_by if stopped_by and not status else status


def collected() -> Iterator[tuple[int, int]]:
    """Collect the processes that have ended; those whose own parent has ended before them fall to the first one."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not process:
            return
        yield process, status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
