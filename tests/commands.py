"""The project's commands, started as a user starts them, or as forks of one process that has imported everything.

Importing takes seconds each time; a fork has done it. ``python tests/commands.py FD`` is the process that is forked: it
imports, computes nothing, has one thread, and forks for each request that comes over the socket FD. The fork then runs
the script as ``python SCRIPT`` does. Its environment is the one that is asked for, but what libraries read of it while
they are imported is settled by then; a test that is about such things, or about signals, starts afresh.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "engine.train", "engine.evaluate", "engine.throughput", "tasks.report", "predict", "utils.event_file",
    "concurrent.futures.process", "engine.export", "reports.page", "reports.looking", "matplotlib.pyplot",
)  # fmt: skip
"""With all that these import, most of a command's start is done."""
LONGEST_MESSAGE = 1 << 17
PR_SET_PDEATHSIG = 1


def start(
    *command, nproc: int = 1, fresh: bool = False, cwd: Path = ROOT, timeout: float = 600, **environment
) -> subprocess.CompletedProcess:
    """Run ``python COMMAND`` to its end, as so many processes as torchrun would start.

    Args:
        fresh: in processes of their own from the start on, under the real torchrun if there are several.
        environment: variables that differ from those of the tests.
    """
    import torch

    words = [str(word) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if not fresh and not torch.cuda.is_available():  # a driver that has been asked for its GPUs survives no fork
        return start_forks(words, nproc, cwd, timeout, environment)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)] if nproc > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def start_forks(
    words: list[str], nproc: int, cwd: Path, timeout: float, environment: dict[str, str]
) -> subprocess.CompletedProcess:
    """The same by the warm process."""
    environments, store = [environment], None
    if nproc > 1:
        environments, store = environments_of_ranks(nproc, environment)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        request = {"words": words, "cwd": str(cwd), "timeout": timeout, "environments": environments}
        socket.send_fds(warm_process(), [json.dumps(request).encode()], [file.fileno() for file in files])
        answer = warm_process().recv(LONGEST_MESSAGE)
        assert answer, "the warm process has ended"
        said = []
        for file in files:
            file.seek(0)
            said.append(file.read())
    del store  # which the ranks needed until here
    statuses = json.loads(answer)
    if statuses is None:
        raise subprocess.TimeoutExpired(words, timeout, *said)
    status = statuses[0] if nproc == 1 else int(any(statuses))
    return subprocess.CompletedProcess(words, status, *said)


def environments_of_ranks(nproc: int, environment: dict[str, str]):
    """What torchrun tells its ranks, and the key-value store that it keeps for them."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    told = {
        "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port,
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    shared = environment | {key: str(value) for key, value in told.items()}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)], store


@functools.cache
def warm_process() -> socket.socket:
    """The socket of the process that is forked; it ends when this one has."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        )  # fmt: skip
    return ours


def serve(connection: socket.socket) -> list[str]:
    """Fork for each request. It returns in the forks, with the words of the command that they are to run."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, 2)
        if not message:
            os._exit(0)
        request = json.loads(message)
        running = []
        for environment in request["environments"]:
            running.append(os.fork())
            if not running[-1]:
                connection.close()
                become_new(request["cwd"], environment, files)
                return request["words"]
        for file in files:
            os.close(file)
        statuses = wait_for(running, time.monotonic() + request["timeout"])
        connection.send(json.dumps(statuses).encode())


def become_new(cwd: str, environment: dict[str, str], files: list[int]) -> None:
    """Make this process what a new one would be; it ends with the one that has forked it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(file, number)
        os.close(file)


def end_after(command: Callable[[], Any]) -> NoReturn:
    """End as Python does, without freeing what was imported: that takes a second and more."""
    status: Any = 0
    try:
        command()
    except SystemExit as error:
        status = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def wait_for(running: list[int], deadline: float) -> list[int] | None:
    """The exit statuses, None if it takes too long. When one process fails the others are stopped, as by torchrun."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(running):
        for pid in set(running) - statuses.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            statuses[pid] = os.waitstatus_to_exitcode(status)
            for other in set(running) - statuses.keys() if status else ():
                os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in set(running) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return None
        time.sleep(0.005)
    return [statuses[pid] for pid in running]


if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    path = sys.path[1:]
    sys.path[0] = str(ROOT)
    for name in IMPORTED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with several threads cannot be forked safely"
    gc.freeze()  # else to collect garbage would copy the memory that the forks share
    sys.argv = serve(connection)
    more = [folder for folder in os.environ.get("PYTHONPATH", "").split(":") if folder and folder not in path]
    sys.path[:] = [str(Path(sys.argv[0]).resolve().parent), *more, *path]
    end_after(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
