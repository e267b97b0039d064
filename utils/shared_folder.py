"""Whether all hosts of a run see the folder that its results go to."""

import os
import socket
import time
import uuid
from pathlib import Path

from utils.distributed import AgreedError, agreement, from_main, gathered, hosts, is_main
from utils.files import writing
from utils.launchers import may_start_elsewhere

SECONDS_TO_APPEAR = 10
"""A network file system may show a new file to other hosts after a while."""
POLL_SECONDS = 0.2


def check_shared(folder: Path) -> str:
    """See which hosts of the run do not see ``folder``, which rank 0 holds; returns a line about them, or nothing.

    Rank 0 alone reads and writes it. So the others can do without, as long as rank 0 stays where it is. A collective.

    Raises:
        AgreedError: torchrun may start rank 0 on another host, where the run would begin anew.
    """
    blind = hosts_without(folder)
    if not blind:
        return ""
    home = hosts()[0]
    said = f"{', '.join(blind)} {'does' if len(blind) == 1 else 'do'} not see {folder.absolute()} of {home}"
    if may_start_elsewhere():
        raise AgreedError(
            f"{said}: a run that torchrun may start again (--max-restarts, --nnodes MIN:MAX) needs a folder that all "
            "hosts share; choose another --output"
        )
    return f"{said}: only rank 0 needs it, so always start with {home} as its host"


def hosts_without(folder: Path) -> list[str]:
    """Name the hosts on which a file that rank 0 makes in ``folder`` does not appear. A collective."""
    if len({*hosts()}) == 1:
        return []
    probe = folder / f".probe-{from_main(uuid.uuid4().hex)}"
    with agreement():
        if is_main():
            with writing(probe, "choose another --output"):
                probe.touch()
    looks_until = time.monotonic() + SECONDS_TO_APPEAR
    while not os.path.exists(probe) and time.monotonic() < looks_until:
        time.sleep(POLL_SECONDS)
    seen = gathered((socket.gethostname(), os.path.exists(probe)))  # False also where it may not look
    if is_main():
        probe.unlink(missing_ok=True)
    return sorted({host for host, is_there in seen if not is_there})
